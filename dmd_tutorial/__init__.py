"""Distribution matching distillation, piece by piece: the package behind the book.

One interface runs through the house, ``denoised = D(x, sigma, label=None)``. A room is a file; it
imports only from rooms below it. From the ground up, with their chapters:

    checks      what every room refuses: shapes, types, values; one number a sample beside x
    files       whole or as they were: JSON, tensors with a header                ch. 2
    noise       random streams, noise levels, the ways to draw them, schedules    ch. 1
    denoisers   preconditioning, score, noise and v, the denoising loss           ch. 1, 2
    adapters    models trained in other terms as denoisers: yours, diffusers'     own model
    generators  the students: a denoiser used once, or at a few levels            ch. 2, 11
    networks/   raw networks: an MLP for points, a U-Net for images               ch. 1
    mixtures    Gaussian mixtures, whose denoiser is exact                        ch. 1
    samplers/   from noise to samples, one algorithm a function                   ch. 2, 7
    data/       points, digits, captioned shapes; labels, noise by seed           ch. 1, 2, 12
    anchor      pairs of noise and the teacher's sample, L2 and LPIPS             ch. 5
    dmd         the heart: weighting, gradient, losses, one iteration             ch. 3, 4, 6
    training    the loops around it: a teacher's, a student's                     ch. 6
    text_to_image/  latents and prompts, guidance, LoRA                           ch. 12
    edm/        the published teachers, read without running their pickles        ch. 6
    pretrained  networks on disk, the ones that come with the package             ch. 2
    features    what images are compared in                                       ch. 2
    metrics     Frechet distance, precision and recall, coverage, floors          ch. 2, 5, 6
    survey/     the other methods on the road to one step                         ch. 8-11
    runs/       at full size: command line, presets, memory, checkpoints, images  ch. 6
    notebook/   what a notebook needs of a book: figures, sliders, exercises      all

Read `dmd` first; ``dmd --help`` is the command line.
"""

__version__ = "0.1.0"
