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
    for (let round = 0; round < 50; round++) critic = refit(critic, xy);
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
    const { teacher, xy, settings, critic } = sim;
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
    const covered = shares.filter((share) => share >= 0.1 / shares.length).length;
    const rightSpread = spread > 0.75 * std && spread < 1.25 * std;
    const enough = 0.6 / shares.length;
    if (spread < 0.25 * std && Math.max(...shares) > 0.9) return "one point";
    if (!rightSpread) return "neither";
    if (covered === 1 && Math.max(...shares) > 0.9) return "one mode";
    if (covered === shares.length && Math.min(...shares) > enough) return "every mode";
    return "neither";
  }

  return {
    COUNT, DEFAULTS, WEIGHTINGS, addGradient, advance, calibrate, evaluate, firstCritic, follow,
    karrasGrid, oneGaussian, outcome, randomFrom, refit, roundMixture, simulation, teacherAnswer,
  };
})();
