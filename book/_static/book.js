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
  for (const formula of document.querySelectorAll("div.math mjx-container")) {
    const size = getComputedStyle(formula).fontSize;
    const width = formula.querySelector("mjx-math").offsetWidth / parseFloat(size);
    formula.style.setProperty("--ems", parseFloat(formula.style.minWidth) || width);
    formula.style.setProperty("--size", formula.style.fontSize);
  }
  screenTheme ??= document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
});
addEventListener("afterprint", () => {
  document.documentElement.dataset.theme = screenTheme;
  screenTheme = null;
});

/* On the search page. */
const FURNITURE = '.headerlink, script, style, p:has(> a[href^="https://colab."])';
const DRESS = /\\(?:text|math[a-z]+|left|right|[bB]igg?[lr]?|quad|qquad)(?![a-z])|\\[^a-z]|[{}]/g;

/** What a formula says in one line of text: most of TeX's names are HTML's, too. */
function spoken(tex) {
  const box = document.createElement("textarea");
  box.innerHTML = tex.replace(DRESS, "").replace(/\\([a-z]+)/gi, "&$1;");
  return box.value.replace(/&(\w+);/g, "$1");
}

/** The text of a page, or of a part of it, from which an excerpt is cut: its prose, then code. */
function searched(source, anchor) {
  const page = new DOMParser().parseFromString(source, "text/html");
  const article = page.querySelector(".bd-article");
  const part = (anchor && page.getElementById(anchor.slice(1))) || article;
  for (const each of part.querySelectorAll(FURNITURE)) each.remove();
  for (const formula of part.querySelectorAll("div.math")) formula.replaceWith(" … ");
  for (const formula of part.querySelectorAll("span.math")) {
    formula.replaceWith(spoken(formula.textContent));
  }
  part.append(...part.querySelectorAll("div.cell_input"));
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
