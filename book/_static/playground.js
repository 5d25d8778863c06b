/* Distribution matching with 500 particles, on one page and without a server.

   The first half is mathematics and knows of no page: Gaussian mixtures, the gradient of chapter 3,
   a critic that is fitted to the particles, the pairs of chapter 5. The tests compare it with the
   Python package. The second half draws it and lets the reader take hold of it. A plain script,
   no module: browsers load no module from a file. */

"use strict";

globalThis.dmdPlayground = (() => {
  const COUNT = 500; // particles
  const DRAWS = 2; // noise levels for each particle and step, each with a noise and its mirror image
  const LONGEST = 0.5; // no particle moves further in a step: rare loud levels would fling it away
  const SIGMA_MIN = 0.002;
  const SIGMA_MAX = 80;
  const RHO = 7;
  const BINS = 1000;

  /* ---- Random numbers: the same sequence for a seed in every browser ---- */

  /** Uniform numbers in (0, 1), by mulberry32; `.normal()` gives standard normal ones. */
  function randomFrom(seed) {
    let state = seed >>> 0;
    let kept = null;
    const uniform = () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), 1 | state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 4294967296;
    };
    // Box and Muller: two uniform numbers become two normal ones, the second is kept
    uniform.normal = () => {
      if (kept !== null) {
        const second = kept;
        kept = null;
        return second;
      }
      const radius = Math.sqrt(-2 * Math.log(uniform()));
      const angle = 2 * Math.PI * uniform();
      kept = radius * Math.sin(angle);
      return radius * Math.cos(angle);
    };
    return uniform;
  }

  /* ---- Gaussian mixtures: a flat array, six numbers for each component ---- */

  const PARTS = 6; // weight, mean x, mean y, variance x, covariance, variance y

  /** A mixture of round Gaussians with equal weights. */
  function roundMixture(means, std) {
    return Float64Array.from(means.flatMap(([x, y]) => [1 / means.length, x, y, std ** 2, 0, std ** 2]));
  }

  const squares = new Float64Array(16); // per component: squared distance in standard deviations
  const norms = new Float64Array(16); // weight over the root of the determinant, then the share

  /** Log-density, score and denoised point of a mixture with noise sigma, at (x, y), into `out`.

      Noise adds sigma^2 to every variance; the denoised point follows by Tweedie's formula. */
  function evaluate(mixture, x, y, sigma, out) {
    const components = mixture.length / PARTS;
    const added = sigma * sigma;
    let nearest = Infinity;
    for (let k = 0, at = 0; k < components; k++, at += PARTS) {
      const dx = x - mixture[at + 1], dy = y - mixture[at + 2];
      const xx = mixture[at + 3] + added, xy = mixture[at + 4], yy = mixture[at + 5] + added;
      const determinant = xx * yy - xy * xy;
      squares[k] = (dx * dx * yy - 2 * dx * dy * xy + dy * dy * xx) / determinant;
      norms[k] = mixture[at] / Math.sqrt(determinant);
      // without the nearest component's exponent, all densities could be 0 far out
      if (squares[k] < nearest) nearest = squares[k];
    }
    let total = 0;
    for (let k = 0; k < components; k++) {
      norms[k] *= Math.exp((nearest - squares[k]) / 2);
      total += norms[k];
    }
    let scoreX = 0, scoreY = 0;
    for (let k = 0, at = 0; k < components; k++, at += PARTS) {
      const dx = x - mixture[at + 1], dy = y - mixture[at + 2];
      const xx = mixture[at + 3] + added, xy = mixture[at + 4], yy = mixture[at + 5] + added;
      const share = norms[k] / total / (xx * yy - xy * xy);
      scoreX -= share * (yy * dx - xy * dy);
      scoreY -= share * (xx * dy - xy * dx);
    }
    out.logDensity = Math.log(total) - nearest / 2 - Math.log(2 * Math.PI);
    out.scoreX = scoreX;
    out.scoreY = scoreY;
    out.x = x + added * scoreX;
    out.y = y + added * scoreY;
    return out;
  }

  const blank = () => ({ logDensity: 0, scoreX: 0, scoreY: 0, x: 0, y: 0 });

  /* ---- The gradient of chapter 3 ---- */

  const WEIGHTINGS = {
    // (sigma, mean |x - D_real|) -> w_t, as in the package's `weight`
    eq8: (sigma, error) => (sigma * sigma) / Math.max(error, 1e-6),
    sigma: (sigma) => sigma,
    sigma3: (sigma) => sigma ** 3,
    none: (sigma) => sigma * sigma,
  };

  const real = blank(), fake = blank();

  /** Adds the gradient w_t (s_fake - s_real) of a particle at one noised place to `sum`.

      Without a critic the fake score is 0: its denoised point is the noised place itself. */
  function addGradient(sum, x, y, noisedX, noisedY, sigma, teacher, critic, weighting) {
    evaluate(teacher, noisedX, noisedY, sigma, real);
    let fakeX = noisedX, fakeY = noisedY;
    if (critic) {
      evaluate(critic, noisedX, noisedY, sigma, fake);
      fakeX = fake.x;
      fakeY = fake.y;
    }
    const error = (Math.abs(x - real.x) + Math.abs(y - real.y)) / 2;
    const scale = WEIGHTINGS[weighting](sigma, error) / (sigma * sigma);
    sum.x += scale * (fakeX - real.x);
    sum.y += scale * (fakeY - real.y);
    return sum;
  }

  /* ---- Noise levels and the teacher's answers ---- */

  /** The grid of noise levels, ascending (EDM, Eq. 5). */
  function karrasGrid(bins = BINS, sigmaMax = SIGMA_MAX) {
    const low = SIGMA_MIN ** (1 / RHO), high = sigmaMax ** (1 / RHO);
    return Float64Array.from({ length: bins }, (_, i) => (low + (i / (bins - 1)) * (high - low)) ** RHO);
  }

  /** What the teacher makes of the noise z: 18 steps of Heun's method down its ODE. */
  function teacherAnswer(teacher, z, steps = 18) {
    const levels = [...karrasGrid(steps).reverse(), 0];
    const d = blank();
    let x = SIGMA_MAX * z[0], y = SIGMA_MAX * z[1];
    for (let i = 0; i < steps; i++) {
      const sigma = levels[i], next = levels[i + 1], step = next - sigma;
      evaluate(teacher, x, y, sigma, d);
      const slopeX = (x - d.x) / sigma, slopeY = (y - d.y) / sigma;
      let nextX = x + step * slopeX, nextY = y + step * slopeY;
      if (next > 0) {
        evaluate(teacher, nextX, nextY, next, d);
        nextX = x + (step * (slopeX + (nextX - d.x) / next)) / 2;
        nextY = y + (step * (slopeY + (nextY - d.y) / next)) / 2;
      }
      x = nextX;
      y = nextY;
    }
    return [x, y];
  }

  /* ---- The critic: a mixture fitted to the particles ---- */

  /** Mean, variances and covariance of all particles, as a mixture with one component. */
  function oneGaussian(xy) {
    const count = xy.length / 2;
    let x = 0, y = 0;
    for (let i = 0; i < xy.length; i += 2) {
      x += xy[i] / count;
      y += xy[i + 1] / count;
    }
    let xx = 0, cross = 0, yy = 0;
    for (let i = 0; i < xy.length; i += 2) {
      xx += (xy[i] - x) ** 2 / count;
      cross += ((xy[i] - x) * (xy[i + 1] - y)) / count;
      yy += (xy[i + 1] - y) ** 2 / count;
    }
    return Float64Array.of(1, x, y, xx, cross, yy);
  }

  const TIE = 0.05; // particles' worth of the whole crowd in each component, or an empty one is lost
  const FLOOR = 1e-4; // least variance: a crowd on one point has no density

  /** One step of expectation maximisation: the critic after a look at the particles. */
  function refit(critic, xy) {
    const components = critic.length / PARTS;
    const whole = oneGaussian(xy);
    const sums = new Float64Array(critic.length);
    for (let k = 0, at = 0; k < components; k++, at += PARTS) {
      addMoments(sums, at, TIE, whole[1], whole[2], critic);
      sums[at + 3] += TIE * whole[3];
      sums[at + 4] += TIE * whole[4];
      sums[at + 5] += TIE * whole[5];
    }
    for (let i = 0; i < xy.length; i += 2) {
      evaluate(critic, xy[i], xy[i + 1], 0, fake);
      let total = 0;
      for (let k = 0; k < components; k++) total += norms[k];
      for (let k = 0, at = 0; k < components; k++, at += PARTS) {
        addMoments(sums, at, norms[k] / total, xy[i], xy[i + 1], critic);
      }
    }
    return fromMoments(sums, critic);
  }

  /** Adds a point's share to the sums of one component, counted from the component's old mean. */
  function addMoments(sums, at, share, x, y, critic) {
    const dx = x - critic[at + 1], dy = y - critic[at + 2];
    sums[at] += share;
    sums[at + 1] += share * dx;
    sums[at + 2] += share * dy;
    sums[at + 3] += share * dx * dx;
    sums[at + 4] += share * dx * dy;
    sums[at + 5] += share * dy * dy;
  }

  function fromMoments(sums, critic) {
    const fitted = new Float64Array(sums.length);
    let all = 0;
    for (let at = 0; at < sums.length; at += PARTS) all += sums[at];
    for (let at = 0; at < sums.length; at += PARTS) {
      const n = sums[at], dx = sums[at + 1] / n, dy = sums[at + 2] / n;
      fitted[at] = n / all;
      fitted[at + 1] = critic[at + 1] + dx;
      fitted[at + 2] = critic[at + 2] + dy;
      fitted[at + 3] = sums[at + 3] / n - dx * dx + FLOOR;
      fitted[at + 4] = sums[at + 4] / n - dx * dy;
      fitted[at + 5] = sums[at + 5] / n - dy * dy + FLOOR;
    }
    return fitted;
  }

  /** A critic of so many Gaussians that has seen the particles for a while. */
  function firstCritic(xy, components, random) {
    const [, , , xx, cross, yy] = oneGaussian(xy);
    const parts = [];
    for (let k = 0; k < components; k++) {
      const i = 2 * Math.floor(random() * (xy.length / 2));
      parts.push(1 / components, xy[i], xy[i + 1], xx + FLOOR, cross, yy + FLOOR);
    }
    let critic = Float64Array.from(parts);
    for (let round = 0; round < 20; round++) critic = refit(critic, xy);
    return critic;
  }

  /* ---- The simulation ---- */

  const DEFAULTS = {
    modes: [[-2, 0], [2, 0]],
    modeStd: 0.4,
    start: [1.5, 0.5],
    startStd: 0.3,
    objective: "difference", // "real": no fake score; "anchor": difference and pairs
    weighting: "eq8",
    sigma: 1,
    upTo: true, // draw levels from the grid that ends at sigma; or take sigma itself
    lambda: 0.25,
    critic: 1, // the share of the way to the refitted mixture that the critic goes in a step
    components: 4,
    rate: 0.03,
    seed: 1,
  };

  /** Particles at their start, with a teacher, a critic, and the teacher's answers to their z. */
  function simulation(setup) {
    const settings = { ...DEFAULTS, ...setup };
    const random = randomFrom(settings.seed);
    const z = Float64Array.from({ length: 2 * COUNT }, () => random.normal());
    const xy = z.map((value, i) => settings.start[i % 2] + settings.startStd * value);
    const sim = { settings, random, z, xy, step: 0, scale: 1, strength: 0 };
    sim.critic = firstCritic(xy, settings.components, random);
    follow(sim);
    return sim;
  }

  /** Makes all that is derived from the settings again, after one of them has changed. */
  function follow(sim) {
    const { settings } = sim;
    sim.teacher = roundMixture(settings.modes, settings.modeStd);
    sim.answers = new Float64Array(2 * COUNT);
    for (let i = 0; i < 2 * COUNT; i += 2) {
      sim.answers.set(teacherAnswer(sim.teacher, [sim.z[i], sim.z[i + 1]]), i);
    }
    sim.grid = settings.upTo ? karrasGrid(BINS, Math.max(settings.sigma, 0.01)) : null;
    calibrate(sim);
  }

  /** One of the levels at which a generator is judged: 2 % to 98 % of the grid, or the one level. */
  function drawLevel(sim) {
    if (!sim.grid) return sim.settings.sigma;
    const first = Math.floor(0.02 * BINS), last = Math.floor(0.98 * BINS);
    return sim.grid[first + Math.floor(sim.random() * (last - first + 1))];
  }

  /** The gradient at particle i, averaged over a few draws of noise, into `sum`. */
  function gradientAt(sim, i, weighting, sum) {
    const { teacher, settings, xy, random } = sim;
    const critic = settings.objective === "real" ? null : sim.critic;
    const x = xy[i], y = xy[i + 1];
    sum.x = sum.y = 0;
    for (let draw = 0; draw < DRAWS; draw++) {
      const sigma = drawLevel(sim);
      const dx = sigma * random.normal(), dy = sigma * random.normal();
      addGradient(sum, x, y, x + dx, y + dy, sigma, teacher, critic, weighting);
      addGradient(sum, x, y, x - dx, y - dy, sigma, teacher, critic, weighting);
    }
    sum.x /= 2 * DRAWS;
    sum.y /= 2 * DRAWS;
    return sum;
  }

  /** Finds the factor that makes the step of every weighting as long as that of Eq. 8.

      Otherwise sigma^3 would fling the particles away and sigma hardly move them, and the reader
      would compare step sizes. What is left is which noise levels are heard. */
  function calibrate(sim) {
    sim.scale = 1;
    if (sim.settings.weighting === "eq8") return;
    const random = sim.random;
    const size = {};
    for (const weighting of ["eq8", sim.settings.weighting]) {
      sim.random = randomFrom(7); // the same noise for both
      size[weighting] = meanSquare(sim, weighting);
    }
    sim.random = random;
    sim.scale = Math.sqrt(size.eq8 / Math.max(size[sim.settings.weighting], 1e-300));
  }

  function meanSquare(sim, weighting) {
    const g = { x: 0, y: 0 };
    let total = 0;
    for (let i = 0; i < sim.xy.length; i += 2) {
      gradientAt(sim, i, weighting, g);
      total += g.x * g.x + g.y * g.y;
    }
    return total / (sim.xy.length / 2);
  }

  /** One iteration: every particle moves against its gradient, then the critic looks again. */
  function advance(sim) {
    const { settings, xy, answers } = sim;
    const pull = settings.objective === "anchor" ? 2 * settings.lambda : 0;
    const fitted = settings.critic > 0 ? refit(sim.critic, xy) : null; // to the particles before
    const g = { x: 0, y: 0 };
    let total = 0;
    for (let i = 0; i < xy.length; i += 2) {
      gradientAt(sim, i, settings.weighting, g);
      total += Math.hypot(g.x, g.y);
      let dx = settings.rate * (sim.scale * g.x + pull * (xy[i] - answers[i]));
      let dy = settings.rate * (sim.scale * g.y + pull * (xy[i + 1] - answers[i + 1]));
      const shorten = Math.min(1, LONGEST / Math.hypot(dx, dy));
      if (shorten < 1) {
        dx *= shorten;
        dy *= shorten;
      }
      xy[i] -= dx;
      xy[i + 1] -= dy;
    }
    if (fitted) sim.critic = between(sim.critic, fitted, settings.critic);
    sim.strength = total / COUNT;
    sim.step += 1;
  }

  function between(from, to, share) {
    return from.map((value, i) => value + share * (to[i] - value));
  }

  /* ---- What came of it ---- */

  /** Shares of the modes, spread and divergence, as chapter 5 measures them.

      A particle counts for a mode by the mode's responsibility, and only within the circle that
      holds 99.9 % of the mode. The spread is that around the nearest centre, from its median. */
  function outcome(sim) {
    const { teacher, xy, settings } = sim;
    const critic = refit(sim.critic, xy); // the divergence is not measured by a critic left behind
    const shares = settings.modes.map(() => 0);
    const widest = -2 * Math.log(0.001); // of a squared distance in two dimensions
    const distances = [];
    let divergence = 0;
    for (let i = 0; i < xy.length; i += 2) {
      evaluate(critic, xy[i], xy[i + 1], 0, fake);
      evaluate(teacher, xy[i], xy[i + 1], 0, real);
      divergence += (fake.logDensity - real.logDensity) / COUNT;
      let total = 0;
      for (let k = 0; k < shares.length; k++) total += norms[k];
      let nearest = Infinity;
      for (let k = 0; k < shares.length; k++) {
        nearest = Math.min(nearest, squares[k]);
        if (squares[k] <= widest) shares[k] += norms[k] / total / COUNT;
      }
      distances.push(Math.sqrt(nearest) * settings.modeStd);
    }
    distances.sort((a, b) => a - b);
    const median = (distances[COUNT / 2 - 1] + distances[COUNT / 2]) / 2;
    const spread = median / Math.sqrt(2 * Math.LN2);
    return { shares, spread, divergence, name: nameOf(shares, spread, settings.modeStd) };
  }

  /** The outcome in words, by the limits of chapter 5. */
  function nameOf(shares, spread, std) {
    const count = shares.length;
    const most = Math.max(...shares), least = Math.min(...shares);
    const rightSpread = spread > 0.75 * std && spread < 1.25 * std;
    if (shares.reduce((a, b) => a + b) < 0.5) return "away from the modes";
    if (most > 0.9 && spread < 0.25 * std) return "one point";
    if (rightSpread && least > 0.6 / count) {
      return ["the mode", "both modes"][count - 1] || "every mode";
    }
    const covered = shares.filter((share) => share >= 0.1 / count).length;
    return rightSpread && covered === 1 && most > 0.9 ? "one mode" : "undecided";
  }

  return {
    COUNT, DEFAULTS, WEIGHTINGS, addGradient, advance, calibrate, evaluate, firstCritic, follow,
    karrasGrid, oneGaussian, outcome, randomFrom, refit, roundMixture, simulation, teacherAnswer,
  };
})();

/* ---- The page ---- */

(() => {
  const P = globalThis.dmdPlayground;
  const WIDE = 4, HIGH = 2.6; // half of the window, in the units of x
  const GAP = 0.5; // between two arrows
  const PACE = 60; // steps in a second, on screens of any speed
  const NUDGE = 0.1, STRIDE = 0.5; // an arrow key moves a handle so far, with Shift so far
  const MOST_MODES = 4;

  const LEVELS = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 40, 80];
  const SPREADS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1];

  const figure3 = { start: [1.5, 0.5], startStd: 0.3 };
  const onTheLeft = { start: [-1.5, 0.5], startStd: 0.5 };
  const swing = {
    modes: [[0, 0]], start: [2, 0], startStd: 0.4, weighting: "none", sigma: 0.5, upTo: false,
    components: 1, arrows: "difference",
  };
  /** What each chapter shows, as settings; `steps` is where it stops by itself. */
  const PRESETS = {
    "real-only": {
      title: "Chapter 3: no fake score", ...onTheLeft, objective: "real", steps: 300,
    },
    difference: { title: "Chapter 3: the score difference", ...onTheLeft, steps: 300 },
    "sigma-cubed": {
      title: "Chapter 3: weight σ³, noise up to 80", ...figure3, weighting: "sigma3", sigma: 80,
      arrowSigma: 10, steps: 600,
    },
    "kept-up": { title: "Chapter 4: a critic that keeps up", ...swing, critic: 0.5, steps: 300 },
    slow: { title: "Chapter 4: a slow critic swings", ...swing, critic: 0.02, steps: 300 },
    frozen: { title: "Chapter 4: a frozen critic", ...swing, critic: 0, steps: 120 },
    "figure-3a": {
      title: "Chapter 5: Figure 3 (a), real score only", ...figure3, objective: "real", steps: 300,
    },
    "figure-3b": { title: "Chapter 5: Figure 3 (b), score difference", ...figure3, steps: 600 },
    "figure-3c": {
      title: "Chapter 5: Figure 3 (c), with the anchor", ...figure3, objective: "anchor",
      steps: 600,
    },
    "noise-5": {
      title: "Chapter 5: no anchor, noise up to 5", ...figure3, sigma: 5, rate: 0.06,
      arrowSigma: 2, steps: 600,
    },
  };
  const SHOWN = { arrows: "both", arrowSigma: 0.5, steps: 600 };

  const plain = (value) => String(value).replace("-", "−");
  const percent = (share) => `${Math.round(100 * share)} %`;

  /** Every setting with its control: a list of choices, or a slider over values. */
  const CONTROLS = {
    objective: {
      label: "The particles follow",
      choices: {
        real: "the real score only", difference: "the score difference",
        anchor: "the difference and their pairs (anchor)",
      },
    },
    weighting: {
      label: "Weighting w", choices: { eq8: "Eq. 8", sigma: "σ", none: "σ² (none)", sigma3: "σ³" },
    },
    upTo: {
      label: "Noise", choices: { true: "levels drawn up to σ", false: "the one level σ" },
    },
    sigma: { label: "Noise level σ", values: LEVELS },
    lambda: { label: "Weight of the anchor λ", values: [0, 0.03, 0.1, 0.25, 0.5, 1, 4] },
    critic: {
      label: "Critic’s speed", values: [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1],
      text: (value) => (value === 0 ? "0, frozen" : plain(value)),
    },
    components: { label: "Critic’s Gaussians", choices: { 1: "1", 2: "2", 4: "4", 8: "8" } },
    rate: { label: "Step size", values: [0.01, 0.02, 0.03, 0.06, 0.1] },
    modeStd: { label: "Spread of a mode", values: SPREADS },
    startStd: { label: "Spread of the start", values: SPREADS },
    arrows: {
      label: "Arrows",
      choices: {
        both: "both scores", real: "real score", fake: "minus the fake score",
        difference: "their sum", none: "none",
      },
    },
    arrowSigma: { label: "Arrows at noise level", values: LEVELS },
  };
  /** What has to be made anew when a setting changes; anything else is read at every step. */
  const RESTART = ["startStd"];
  const REFIT = ["components"];

  /* ---- Elements ---- */

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  const button = (text, onclick) => element("button", { type: "button", onclick }, text);

  function control(key, change) {
    const { label, choices, values, text = plain } = CONTROLS[key];
    const id = `dmd-playground-${key}`;
    const field = element("div", { class: "dmd-playground-control" });
    field.append(element("label", { for: id }, label));
    if (choices) {
      const options = Object.entries(choices).map(([value, name]) => element("option", { value }, name));
      const select = element("select", { id, onchange: () => change(key, read(select.value)) }, ...options);
      field.append(select);
      return { field, input: select, show: (value) => (select.value = String(value)) };
    }
    const input = element("input", { type: "range", id, min: 0, max: values.length - 1, step: 1 });
    const said = element("output", { for: id });
    const show = (value) => {
      input.value = values.indexOf(value);
      said.textContent = text(value);
      input.setAttribute("aria-valuetext", text(value));
    };
    input.addEventListener("input", () => {
      const value = values[Number(input.value)];
      show(value);
      change(key, value);
    });
    field.append(said, input);
    return { field, input, show };
  }

  /** The value of a choice: a word, a number, or true and false. */
  function read(text) {
    if (text === "true" || text === "false") return text === "true";
    return Number.isNaN(Number(text)) ? text : Number(text);
  }

  /* ---- Drawing ---- */

  function colours(root) {
    const style = getComputedStyle(root);
    const names = ["ground", "ink", "data", "teacher", "generator", "critic", "pair"];
    return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }

  const place = blankPlace(), other = blankPlace();
  function blankPlace() {
    return { logDensity: 0, scoreX: 0, scoreY: 0, x: 0, y: 0 };
  }

  /** Adds an arrow to the path; a strong score saturates, so that no arrow hides its neighbours. */
  function addArrow(path, x, y, vx, vy) {
    const size = Math.hypot(vx, vy);
    if (size < 0.02) return;
    const length = (0.9 * GAP * size) / (1 + size);
    const ux = vx / size, uy = vy / size, head = 0.3 * length;
    const endX = x + length * ux, endY = y + length * uy;
    path.moveTo(x, y);
    path.lineTo(endX, endY);
    path.moveTo(endX - head * (ux + 0.6 * uy), endY - head * (uy - 0.6 * ux));
    path.lineTo(endX, endY);
    path.lineTo(endX - head * (ux - 0.6 * uy), endY - head * (uy + 0.6 * ux));
  }

  /** The arrows of the fields that are asked for, as paths in the units of x. */
  function arrowPaths(sim) {
    const { arrows, arrowSigma, upTo, objective } = sim.settings;
    const paths = { teacher: new Path2D(), critic: new Path2D(), ink: new Path2D() };
    if (arrows === "none") return paths;
    const sigma = upTo ? arrowSigma : sim.settings.sigma;
    const unit = Math.hypot(sigma, 0.4); // scores are drawn in units of a noisy mode's width
    const both = arrows === "both", fakeCounts = objective !== "real";
    for (let x = GAP / 2 - WIDE; x < WIDE; x += GAP) {
      for (let y = GAP / 2 - HIGH; y < HIGH; y += GAP) {
        P.evaluate(sim.teacher, x, y, sigma, place);
        P.evaluate(sim.critic, x, y, sigma, other);
        const rx = unit * place.scoreX, ry = unit * place.scoreY;
        const fx = fakeCounts ? -unit * other.scoreX : 0, fy = fakeCounts ? -unit * other.scoreY : 0;
        if (both || arrows === "real") addArrow(paths.teacher, x, y, rx, ry);
        if (both || arrows === "fake") addArrow(paths.critic, x, y, fx, fy);
        if (arrows === "difference") addArrow(paths.ink, x, y, rx + fx, ry + fy);
      }
    }
    return paths;
  }

  /** The ellipse of a Gaussian at so many standard deviations. */
  function addEllipse(path, mixture, at, deviations) {
    const [xx, xy, yy] = mixture.subarray(at + 3, at + 6);
    const middle = (xx + yy) / 2, half = Math.hypot((xx - yy) / 2, xy);
    const angle = Math.atan2(2 * xy, xx - yy) / 2;
    const long = deviations * Math.sqrt(middle + half);
    const short = deviations * Math.sqrt(Math.max(middle - half, 0));
    path.moveTo(mixture[at + 1] + long * Math.cos(angle), mixture[at + 2] + long * Math.sin(angle));
    path.ellipse(mixture[at + 1], mixture[at + 2], long, short, angle, 0, 2 * Math.PI);
  }

  function draw(canvas, sim, colour) {
    const pen = canvas.getContext("2d");
    const scale = canvas.width / (2 * WIDE), pixel = canvas.ratio / scale;
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.fillStyle = colour.ground;
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.setTransform(scale, 0, 0, -scale, canvas.width / 2, canvas.height / 2); // y goes up
    const stroke = (path, name, width, dash = []) => {
      pen.strokeStyle = colour[name];
      pen.lineWidth = width * pixel;
      pen.setLineDash(dash.map((length) => length * pixel));
      pen.stroke(path);
    };
    const paths = arrowPaths(sim);
    for (const name of ["teacher", "critic", "ink"]) stroke(paths[name], name, 1.1);
    stroke(rings(sim.teacher, [1, 2]), "teacher", 1.8);
    if (sim.settings.objective === "anchor") stroke(strings(sim), "pair", 1);
    drawParticles(pen, sim, colour.generator, pixel);
    if (sim.settings.objective !== "real") stroke(rings(sim.critic, [1]), "critic", 2, [6, 4]);
  }

  function rings(mixture, deviations) {
    const path = new Path2D();
    for (let at = 0; at < mixture.length; at += 6) {
      if (mixture[at] > 0.02) deviations.forEach((many) => addEllipse(path, mixture, at, many));
    }
    return path;
  }

  /** Lines from some particles to the teacher's answer to their noise. */
  function strings({ xy, answers }) {
    const path = new Path2D();
    for (let i = 0; i < xy.length; i += 20) {
      path.moveTo(xy[i], xy[i + 1]);
      path.lineTo(answers[i], answers[i + 1]);
    }
    return path;
  }

  function drawParticles(pen, { xy }, colour, pixel) {
    const size = 3.6 * pixel;
    pen.fillStyle = colour;
    pen.beginPath();
    for (let i = 0; i < xy.length; i += 2) pen.rect(xy[i] - size / 2, xy[i + 1] - size / 2, size, size);
    pen.fill();
  }

  /* ---- Words ---- */

  function sentences(sim) {
    const { shares, spread, divergence, name } = P.outcome(sim);
    const left = Math.max(0, 1 - shares.reduce((a, b) => a + b));
    const each = shares.map((share, k) => `mode ${k + 1}: ${percent(share)}`).join(", ");
    return (
      `Step ${sim.step}: ${name}. In ${each}, elsewhere ${percent(left)}. ` +
      `Spread ${spread.toFixed(2)} (a mode’s is ${sim.settings.modeStd}). ` +
      `Divergence about ${plain(divergence.toFixed(2))}.` +
      (sim.step ? ` Mean length of the gradient ${sim.strength.toPrecision(2)}.` : "")
    );
  }

  const placeText = ([x, y]) => `x ${plain(x.toFixed(1))}, y ${plain(y.toFixed(1))}`;

  /* ---- Putting it together ---- */

  class Playground {
    constructor(root) {
      this.root = root;
      this.playing = false;
      this.seen = true;
      this.calm = matchMedia("(prefers-reduced-motion: reduce)");
      this.build();
      this.choose("figure-3b");
      this.watch();
      requestAnimationFrame((now) => this.frame(now));
    }

    build() {
      this.canvas = element("canvas", { role: "img" });
      this.board = element("div", { class: "dmd-playground-board" }, this.canvas);
      this.reading = element("p", { class: "dmd-playground-reading" });
      this.voice = element("p", { class: "dmd-playground-voice", role: "status" });
      this.preset = element(
        "select", { id: "dmd-playground-preset", onchange: () => this.choose(this.preset.value) },
        ...Object.entries(PRESETS).map(([value, { title }]) => element("option", { value }, title)),
      );
      const presetField = element(
        "div", { class: "dmd-playground-control dmd-playground-preset" },
        element("label", { for: "dmd-playground-preset" }, "A figure of the book"), this.preset,
      );
      this.playButton = button("Play", () => this.play(!this.playing));
      this.addButton = button("Add a mode", () => this.addMode());
      this.dropButton = button("Remove a mode", () => this.dropMode());
      const buttons = element(
        "div", { class: "dmd-playground-buttons" },
        this.playButton,
        button("One step", () => this.single()),
        button("Start again", () => this.restart("Back at the start.")),
        this.addButton, this.dropButton,
      );
      this.controls = {};
      const fields = Object.keys(CONTROLS).map((key) => {
        this.controls[key] = control(key, (name, value) => this.change(name, value));
        return this.controls[key].field;
      });
      const panel = element("div", { class: "dmd-playground-controls" }, ...fields);
      this.root.append(element(
        "div", { class: "dmd-playground-app", role: "group", "aria-label": "Playground" },
        presetField, this.board, legend(), buttons, this.reading, panel, this.voice,
      ));
      this.root.classList.add("dmd-playground-ready");
    }

    /** Follows the page: its size, its colours, whether anybody sees the picture. */
    watch() {
      const dye = () => {
        this.colour = colours(this.root);
        draw(this.canvas, this.sim, this.colour); // at once: paper does not wait for a next frame
      };
      this.resize();
      dye();
      new MutationObserver(dye).observe(document.documentElement, { attributeFilter: ["data-theme"] });
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dye);
      new ResizeObserver(() => this.resize()).observe(this.board);
      new IntersectionObserver(([entry]) => (this.seen = entry.isIntersecting)).observe(this.board);
    }

    resize() {
      this.canvas.ratio = Math.min(devicePixelRatio || 1, 2); // more cannot be seen, and costs
      const width = Math.round(this.board.clientWidth * this.canvas.ratio);
      this.canvas.width = width;
      this.canvas.height = Math.round((width * HIGH) / WIDE);
      this.stale = true;
    }

    choose(name) {
      const { title, ...settings } = PRESETS[name];
      this.preset.value = name;
      this.settings = { ...P.DEFAULTS, ...SHOWN, ...settings };
      this.settings.modes = this.settings.modes.map((mode) => [...mode]);
      this.settings.start = [...this.settings.start];
      this.showSettings();
      this.makeHandles();
      this.restart(`${title}. Press Play.`);
    }

    showSettings() {
      for (const [key, { show }] of Object.entries(this.controls)) show(this.settings[key]);
      const { objective, upTo, modes } = this.settings;
      this.controls.lambda.input.disabled = objective !== "anchor";
      this.controls.arrowSigma.input.disabled = !upTo;
      for (const key of ["critic", "components"]) this.controls[key].input.disabled = objective === "real";
      this.addButton.disabled = modes.length === MOST_MODES;
      this.dropButton.disabled = modes.length === 1;
    }

    change(key, value) {
      this.settings[key] = value;
      this.showSettings();
      if (RESTART.includes(key)) this.restart();
      else this.follow(REFIT.includes(key));
    }

    /** Goes on from where the particles are, with the present settings. */
    follow(refit = false) {
      this.sim.settings = this.settings;
      if (refit) {
        this.sim.critic = P.firstCritic(this.sim.xy, this.settings.components, this.sim.random);
      }
      P.follow(this.sim);
      this.tell();
    }

    restart(words) {
      this.play(false, words);
      this.sim = P.simulation(this.settings);
      this.sim.settings = this.settings;
      this.stop = this.settings.steps;
      this.tell();
    }

    play(on, words = on ? "Playing." : `Paused. ${sentences(this.sim)}`) {
      this.playing = on;
      this.playButton.textContent = on ? "Pause" : "Play";
      this.last = undefined;
      if (on && this.sim.step >= this.stop) this.stop = this.sim.step + this.settings.steps;
      this.say(words);
    }

    single() {
      if (this.playing) this.play(false, "");
      P.advance(this.sim);
      this.tell();
      this.say(sentences(this.sim));
    }

    say(words) {
      this.voice.textContent = words;
    }

    /** Writes what is to be seen beside the picture and into it. */
    tell() {
      this.stale = true;
      const words = sentences(this.sim);
      this.reading.textContent = words;
      this.canvas.setAttribute("aria-label", `${P.COUNT} particles among the modes. ${words}`);
      this.told = performance.now();
    }

    /** Called for every picture of the screen. */
    frame(now) {
      requestAnimationFrame((later) => this.frame(later));
      if (this.moved) this.handleMoved();
      if (this.playing && this.seen) this.steps(now);
      // who asked for little motion gets a new picture once a second
      const wait = this.playing && this.calm.matches ? 1000 : 0;
      if (!this.stale || now - (this.drawn || 0) < wait) return;
      draw(this.canvas, this.sim, this.colour);
      this.drawn = now;
      this.stale = false;
    }

    steps(now) {
      const passed = this.last === undefined ? 1 : ((now - this.last) * PACE) / 1000 + this.rest;
      const due = Math.min(Math.round(passed), 3); // a slow machine plays slower, it never stalls
      this.rest = Math.max(-1, Math.min(passed - due, 1));
      this.last = now;
      for (let i = 0; i < due && this.sim.step < this.stop; i++) P.advance(this.sim);
      this.stale = true;
      if (now - this.told > 500) this.tell();
      if (this.sim.step < this.stop) return;
      this.tell();
      this.play(false, `Stopped. ${sentences(this.sim)}`);
    }

    /* ---- Handles ---- */

    makeHandles() {
      for (const handle of this.board.querySelectorAll("button")) handle.remove();
      const { modes, start } = this.settings;
      modes.forEach((mode, k) => this.addHandle(mode, `Mode ${k + 1}`, String(k + 1), "mode"));
      this.addHandle(start, "Start of the particles", "start", "start");
    }

    addHandle(point, name, text, kind) {
      const handle = element(
        "button", { type: "button", class: `dmd-playground-handle dmd-playground-${kind}` },
        element("span", {}, text),
      );
      const put = (x, y) => {
        point[0] = Math.max(-WIDE, Math.min(WIDE, x));
        point[1] = Math.max(-HIGH, Math.min(HIGH, y));
        show();
        this.moved = kind;
      };
      const show = () => {
        handle.style.left = `${50 + (50 * point[0]) / WIDE}%`;
        handle.style.top = `${50 - (50 * point[1]) / HIGH}%`;
        handle.setAttribute("aria-label", `${name}: ${placeText(point)}. Arrow keys move it.`);
      };
      this.listen(handle, point, put, name);
      show();
      this.board.append(handle);
    }

    listen(handle, point, put, name) {
      handle.addEventListener("pointerdown", (event) => handle.setPointerCapture(event.pointerId));
      handle.addEventListener("pointermove", (event) => {
        if (!handle.hasPointerCapture(event.pointerId)) return;
        const box = this.canvas.getBoundingClientRect();
        const x = (2 * (event.clientX - box.left)) / box.width - 1;
        const y = 1 - (2 * (event.clientY - box.top)) / box.height;
        put(WIDE * x, HIGH * y);
      });
      handle.addEventListener("pointerup", () => this.say(`${name}: ${placeText(point)}.`));
      handle.addEventListener("keydown", (event) => {
        const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
        const way = ways[event.key];
        if (!way || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault(); // the page would scroll
        event.stopPropagation(); // the theme's arrow keys would turn the page
        const far = event.shiftKey ? STRIDE : NUDGE;
        put(point[0] + far * way[0], point[1] + far * way[1]);
        this.say(`${name}: ${placeText(point)}.`);
      });
    }

    /** Once for a picture, however many movements of the finger there were. */
    handleMoved() {
      if (this.moved === "start") this.restart("");
      else this.follow();
      this.moved = null;
    }

    addMode() {
      const { modes } = this.settings;
      const free = [[0, 1.6], [0, -1.6], [-2, 0], [2, 0]];
      const near = ([x, y]) => Math.min(...modes.map((mode) => Math.hypot(x - mode[0], y - mode[1])));
      modes.push(free.reduce((best, point) => (near(point) > near(best) ? point : best)));
      this.modesChanged(`Mode ${modes.length} added at ${placeText(modes.at(-1))}.`);
    }

    dropMode() {
      const count = this.settings.modes.length;
      this.settings.modes.pop();
      this.modesChanged(`Mode ${count} removed.`);
    }

    modesChanged(words) {
      this.showSettings();
      this.makeHandles();
      this.follow();
      this.say(words);
    }
  }

  function legend() {
    const entries = {
      teacher: "target, and the real score", critic: "the critic’s fit, and minus its score",
      generator: "particles",
    };
    const items = Object.entries(entries).map(([role, text]) =>
      element("li", {}, element("span", { class: `dmd-playground-dot dmd-playground-${role}` }), text));
    return element("ul", { class: "dmd-playground-legend" }, ...items);
  }

  P.PRESETS = PRESETS;
  if (!globalThis.document) return;
  const root = document.getElementById("dmd-playground");
  if (root) P.page = new Playground(root);
})();
