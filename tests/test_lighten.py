"""Pages of the site on a diet: icons, scripts, sizes."""

import lighten
import pytest
from PIL import Image

SCRIPT = (
    'x={bars:[448,512,["navicon"],"f0c9","M0 96C0"],moon:[384,512,[],"f186","M1 1"]},'
    '{moon:[384,512,[],"f186","M2 2"]}'
)
PAGE = """<html><head><script data-cfasync="false">colours</script>
<script defer src="../_static/scripts/fontawesome.js?digest=1"></script>
<script src="a.js"></script><script>b</script></head>
<body><i class="fa-solid fa-moon fa-lg"></i><p>Text</p></body></html>"""


def test_the_icons_of_the_pages_are_found():
    assert lighten.icons_used([PAGE]) == {("fa-solid", "fa-moon")}


def test_an_icon_is_drawn_with_the_outline_of_its_family():
    assert "M2 2" in lighten.rule("fa-solid", "fa-moon", SCRIPT)
    assert "M1 1" in lighten.rule("fa-regular", "fa-moon", SCRIPT)


def test_an_icon_that_the_theme_lacks_is_refused():
    with pytest.raises(ValueError, match="no icon 'fa-sun'"):
        lighten.rule("fa-solid", "fa-sun", SCRIPT)


def test_scripts_follow_the_text_in_their_order_and_colours_are_chosen_before_it():
    page = lighten.light(PAGE)
    text = page.index("Text")
    assert page.index("colours") < text < page.index("a.js") < page.index("<script>b")
    assert "fontawesome" not in page
    assert '<link rel="stylesheet" href="../_static/icons.css" />' in page
    assert lighten.light(page) == page


def test_the_search_and_its_index_stay_on_the_search_page():
    scripts = (
        '<script src="../_static/searchtools.js"></script><script src="searchindex.js"></script>'
    )
    page = PAGE.replace("</head>", f"{scripts}</head>")
    assert lighten.light(page) == lighten.light(PAGE)
    of_search = page.replace("<body>", '<body><div id="search-results"></div>')
    assert scripts in lighten.light(of_search)


def test_a_picture_gets_its_size(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    page = (
        '<img alt="A." src="a.png"><img width="3" src="a.png"><img src="data:image/png;base64,x">'
    )
    sized = lighten.sized(page, tmp_path)
    assert sized == page.replace("<img alt", '<img width="30" height="20" alt')
    drawing = '<svg xmlns="http://www.w3.org/2000/svg" width="7" height="5"/>'
    (tmp_path / "b.svg").write_text(drawing)
    sized = lighten.sized('<img alt="B." src="b.svg">', tmp_path)
    assert sized == '<img width="7" height="5" alt="B." src="b.svg">'


@pytest.mark.parametrize(
    ("tex", "em"),  # as a browser measures what MathJax makes of them
    [
        (r"x", 0.73),
        (r"\sigma_{\text{data}}", 2.47),
        (r"\sigma_{\min}, \sigma_{\max}", 5.19),
        (r"p * \mathcal N(0, \sigma^2 I)", 7.09),
        (r"\mathbb E_{x \sim p}[\log p(x) - \log q(x)]", 13.11),
    ],
)
def test_the_width_of_a_formula_is_known_before_it_is_set(tex, em):
    assert lighten.width(tex) == pytest.approx(em, abs=0.3)


def test_a_formula_gets_its_room_and_keeps_its_source():
    span = r'<span class="math notranslate nohighlight">\(a &lt; b\)</span>'
    display = r'<div class="math notranslate nohighlight">\[a\]</div>'
    unreadable = span.replace("a &lt; b", r"\unheardof")
    page = lighten.roomy(span + display + unreadable)
    room = f' style="--room: {lighten.width("a < b"):.2f}em">'
    assert page == span.replace('">', f'"{room}', 1) + display + unreadable
    assert lighten.roomy(page) == page
