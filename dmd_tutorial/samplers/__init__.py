"""Samplers: each one algorithm, written as a generator that yields a small record per step.

A notebook can plot the trajectory, stop early, or count evaluations; `sample` just runs one to
its end. The state is float64 (float32 on a device without it), because many small steps add up; the
denoiser is called in the type of the noise that was given. What their arguments mean, once for all:

    denoiser    the teacher, or any other D(x, sigma, label)
    z           standard normal noise; the start is levels[0] * z
    levels      noise levels, which must fall; the last may be 0
    label       what each sample is made under, or None
    order       how many answers of the denoiser a step of a fast solver uses: 1, 2 or 3
    rng         where new noise comes from; torch's own source without one
"""

from dmd_tutorial.samplers.ancestral import ancestral, ddim, ddim_noise, ddpm_levels
from dmd_tutorial.samplers.classical import euler, heun, heun_step, rk45, stochastic
from dmd_tutorial.samplers.diffusion import VE, VP, Process, probability_flow, reverse_sde
from dmd_tutorial.samplers.langevin import annealed_langevin, langevin
from dmd_tutorial.samplers.multistep import deis, dpm_solver, pndm, polynomial_weights, unipc
from dmd_tutorial.samplers.run import evaluations, one_step, sample
from dmd_tutorial.samplers.step import Step
