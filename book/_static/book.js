/* What the theme leaves to be done in the browser: formulas that fit, paper, the search page. */
"use strict";

/* On a line. A formula that is wide breaks at its relations and signs, as TeX would break it:
   MathJax sets it in one piece, which a phone cuts off. */
const WIDE = 12; // em; what book/tools/lighten.py could not measure may be wide

function breakable() {
  for (const formula of document.querySelectorAll("span.math")) {
    if (parseFloat(formula.style.getPropertyValue("--room") || Infinity) < WIDE) continue;
    formula.classList.add("breakable");
    for (const sign of formula.querySelectorAll("mjx-math > mjx-mo[space]:has(+ [space])")) {
      sign.after(document.createElement("wbr"));
    }
  }
}
if (window.MathJax) MathJax.startup.promise.then(breakable);

/* On paper. Nothing scrolls there: the style sheet shrinks an equation that needs more `ems` than
   its column has. And paper is white, whatever the screen was. */
let screenTheme = null;

addEventListener("beforeprint", () => {
  const formulas = [...document.querySelectorAll("div.math mjx-container")];
  const widths = formulas.map((formula) => {
    const size = parseFloat(getComputedStyle(formula).fontSize);
    return parseFloat(formula.style.minWidth) || formula.firstChild.offsetWidth / size;
  });
  formulas.forEach((formula, i) => { // after all were measured, or each would be laid out anew
    formula.style.setProperty("--ems", widths[i]);
    formula.style.setProperty("--size", formula.style.fontSize);
  });
  screenTheme ??= document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
});
addEventListener("afterprint", () => {
  document.documentElement.dataset.theme = screenTheme;
  screenTheme = null;
});

/* On the search page. */
const FURNITURE = ".headerlink, script, style, h1, details.hide > summary";
const HEAD = /^(Time|Builds on): |^Open in Colab$/; // of a chapter: says little about a word
const DRESS = /\\(?:text|math[a-z]+|hat|tilde|bar|left|right|[bB]igg?[lr]?|q?quad)(?![a-z])|\\[^a-z]|[{}]/gi;

/** What a formula says in one line of text: most of TeX's names are HTML's, too. */
function spoken(tex) {
  if (/frac|sqrt|begin/.test(tex)) return "…";
  const box = document.createElement("textarea");
  box.innerHTML = tex.replace(DRESS, "").replace(/\\cdot/g, "·").replace(/\\([a-z]+)/gi, "&$1;");
  return box.value.replace(/&(\w+);/g, "$1");
}

/** The text of a page, or of a part of it, from which an excerpt is cut: prose before all else. */
function searched(source, anchor) {
  const page = new DOMParser().parseFromString(source, "text/html");
  const article = page.querySelector(".bd-article");
  const part = (anchor && page.getElementById(anchor.slice(1))) || article;
  for (const each of part.querySelectorAll(FURNITURE)) each.remove();
  for (const formula of part.querySelectorAll("div.math")) formula.replaceWith(" … ");
  for (const formula of part.querySelectorAll("span.math")) {
    formula.replaceWith(spoken(formula.textContent.trim().slice(2, -2)));
  }
  const head = [...part.querySelectorAll("p")].filter((each) => HEAD.test(each.textContent));
  const last = [...head, ...part.querySelectorAll("div.cell_input")];
  part.append(...last.flatMap((each) => [" ", each]));
  return part.textContent.replace(/\s+/g, " ");
}

if (typeof Search !== "undefined") {
  Search.htmlToText = searched;
  const titles = Object.entries(Search._index.alltitles);
  Search._index.alltitles = Object.fromEntries(
    titles.map(([title, places]) => [title.includes("\\") ? spoken(title) : title, places]),
  );
  // A browser reads no file from another file's script: there the search gives titles alone.
  if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}
