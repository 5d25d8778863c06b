// One slider of a page without a kernel. It finds its parts by the figure's id, runs once, and asks
// nothing of the page. JupyterLab takes the arrow keys for itself, unless they are stopped at the
// window. sliders.py puts the id in the place of %s and leaves these comments out.
(() => {
  const root = document.getElementById("%s");
  if (!root || root.dataset.ready) return;
  root.dataset.ready = "yes";
  const axes = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const picture = root.querySelector("img");
  const spoken = root.querySelector("[role=status]");
  const inputs = [...root.querySelectorAll("input")];
  const outputs = [...root.querySelectorAll("output")];
  const update = (event) => {
    let state = 0;
    inputs.forEach((input, i) => {
      const text = axes.texts[i][input.value];
      input.setAttribute("aria-valuetext", text);
      outputs[i].textContent = text;
      state = state * axes.texts[i].length + Number(input.value);
    });
    const frame = axes.frames[state];
    picture.src = "data:image/png;base64," + frame.png;
    picture.alt = frame.alt;
    root.dataset.digest = frame.digest;
    if (event) spoken.textContent = frame.alt;
  };
  for (const input of inputs) {
    input.hidden = false;
    input.addEventListener("input", update);
  }
  update();
  if (window.dmdSliderKeys) return;
  window.dmdSliderKeys = true;
  window.addEventListener("keydown", (event) => {
    const ours = event.target.closest && event.target.closest(".dmd-slider input");
    if (ours && /^(Arrow|Home|End|Page)/.test(event.key)) event.stopImmediatePropagation();
  }, true);
})();
