"""The blocks of docs/performance.md."""

from __future__ import annotations

from research.blocks.shared import block, read, table


@block
def trl_step() -> str:
    """Time and memory of a step of a TRL script."""
    settings = {
        "bf16": "model in bf16, `bf16=False` (as there)",
        "fp32": "model in fp32, `bf16=False` (as there, without bf16 hardware)",
        "autocast": "model in bf16, TRL's default of bf16 autocast",
    }
    document = read("benchmarks/results/trl_step.json")
    variants = list(document["bf16"])
    rows: list[list[str]] = []
    for name, label in settings.items():
        cells = [document[name][variant] for variant in variants]
        rows.append([label, *(f"{cell['time']:.2f}, {cell['bytes']:.2f}" for cell in cells)])
    seconds = ", ".join(f"{document[name]['PEFT']['seconds']:.1f}" for name in settings)
    _, unfused, fused = variants
    gains: list[str] = []
    for name in settings:
        gain = 1 - document[name][fused]["time"] / document[name][unfused]["time"]
        gains.append(f"{100 * gain:.0f}")
    return (
        table(["time, peak memory", *variants], rows)
        + f"\nPEFT's step takes {seconds} seconds in these three rows: 8 rows of "
        f"{document['tokens']} tokens, one thread, {document['repeats']} runs of two measured "
        f"steps\nfor each number, in turn. The fused operation saves {', '.join(gains)} % of the "
        "time of nested with PEFT's forward."
    )


@block
def train_step() -> str:
    """Time and saved bytes of a training step in bf16."""
    names = {
        "PEFT LoRA": "peft",
        "PEFT LoRA, bf16 autocast": "peft-autocast",
        "the paper's form, A P computed in every forward": "published",
        "nested, rule `matryoshka`": "matryoshka",
    }
    cells = {
        (cell["dtype"], cell["rank"]): cell["variants"]
        for cell in read("benchmarks/results/train_step.json")["cells"]
    }
    rows: list[list[str]] = []
    for label, name in names.items():
        variants = [cells["bf16", rank][name] for rank in (8, 32, 256)]
        rows.append([label, *(f"{v['time']:.2f}, {v['saved']:.2f}" for v in variants)])
    nested = cells["fp32", 32]["matryoshka"]
    peft = cells["fp32", 32]["peft"]
    return (
        table(["bf16: time, saved bytes", "R = 8", "R = 32", "R = 256"], rows)
        + f"\nIn float32 at R = 32, nested takes {nested['time']:.2f} times the floor's time and "
        f"saves {nested['saved']:.2f} times its bytes. PEFT's LoRA takes\n{peft['time']:.2f} and "
        f"saves {peft['saved']:.2f}."
    )


@block
def evaluate_ranks() -> str:
    """Time of an evaluation without one of its parts, and of the harness, against all parts."""
    names = {
        "choice-0shot": "choice, no examples in the prompt",
        "choice-5shot": "choice, five examples",
        "generate-short": "answers of up to 8 tokens",
        "generate-long": "answers of up to 64 tokens, three examples",
    }
    sides = {
        "no prefix": "few-shot examples for each prompt",
        "no sharing": "the prompt for each choice",
        "one rank": "one rank after the other",
        "harness": "the harness",
    }
    document = read("benchmarks/results/evaluate_ranks.json")
    results = document["results"]
    rows: list[list[str]] = []
    for task, result in results.items():
        size = f"{result['items']} at {len(result['ranks'])}"
        row = [names[task], size, f"{result['seconds']['all']:.1f}"]
        for side in sides:
            ratio = result["ratios_median_min_max"].get(side)
            row.append("" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*ratio))
        rows.append(row)
    num_different = sum(result["different_answers"] for result in results.values())
    num_ties = sum(result["ties"] for result in results.values())
    largest = max(result["largest_logprob_difference"] for result in results.values())
    repeats = min(result["repeats"] for result in results.values())
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[document["dtype"]]
    heading = ["task", "questions, ranks", "seconds", *sides.values()]
    return (
        table(heading, rows)
        + f"\nMedians of {repeats} measurements, with the smallest and the largest. The model is "
        f"SmolLM2-135M-Instruct in {dtype}.\n"
        f"The machine: {document['machine']}, while other work ran.\n"
        f"{num_different} answers differ from the harness's, and {num_ties} are ties. The largest "
        f"difference of a log-likelihood is {largest:.1e}."
    )


@block
def shrink_layer() -> str:
    """CPU seconds and errors of truncating one layer."""
    names = {
        "SVD of the R x R core, by Cholesky factors (this package)": "ours",
        "the same by QR decompositions (version 0.4)": "QR",
        "full SVD of the dense update": "full SVD",
        "`torch.svd_lowrank` of the dense update": "svd_lowrank",
    }
    measured = read("benchmarks/results/reorder.json")
    rows: list[list[str]] = []
    for label, name in names.items():
        values = [measured[f"one layer, R = {rank}"][name] for rank in (64, 128)]
        rows.append([label, *(f"{v['cpu_seconds']:.3f}, {v['error']:.3f}" for v in values)])
    return table(["CPU seconds, relative error", "R = 64", "R = 128"], rows)


@block
def shrink_file() -> str:
    """What the verbs cost for a whole file, next to reading it."""
    labels = {
        "read": "reading it, cast to float32",
        "info": "`info`",
        "rank": "`export --rank 8`, to {megabytes:.0f} MB",
        "error": "`export --error 10%`, to {megabytes:.0f} MB",
    }
    file = read("benchmarks/results/reorder.json")["whole file, R = 64"]
    rows = [
        [
            label.format(megabytes=file[verb]["bytes"] / 1e6),
            f"{file[verb]['cpu_seconds']:.1f}",
            f"{file[verb]['times_reading']:.1f}",
            f"{file[verb]['peak_MiB']:.0f}",
        ]
        for verb, label in labels.items()
    ]
    megabytes = file["read"]["bytes"] / 1e6
    heading = f"Flux's 494 layers, R = 64, bf16, {megabytes:.0f} MB"
    return table([heading, "CPU seconds", "times reading", "peak MiB"], rows)


@block
def reorder_pictures() -> str:
    """What the moments of a picture cost, next to drawing it."""
    measured = read("benchmarks/results/reorder_pictures.json")
    drawn, moments = measured["draw"], measured["moments"]
    seconds = drawn["cpu_seconds"], moments["cpu_seconds"]
    return (
        f"* **Cost.** A picture takes {seconds[1] / seconds[0]:.1f} times as long as drawing it: "
        f"{seconds[1]:.1f} and {seconds[0]:.1f} CPU seconds for a small\n  Flux (`python "
        "benchmarks/reorder_pictures.py`). The denoiser computes each step, computes it again for "
        "the gradients, and\n  backpropagates. The gradients are checkpointed: the peak memory "
        f"above that of the model is {moments['peak_MiB']:.0f} MiB there, and "
        f"{drawn['peak_MiB']:.0f} MiB for drawing."
    )


@block
def file_commands() -> str:
    """CPU seconds and peak memory of commands on files."""
    names = {
        "`matryoshka --help`": "--help",
        "`info` of a folder of 39 MB": "info, 39 MB folder",
        "`export --rank 4` of a folder of 39 MB": "export --rank 4, 39 MB folder",
        "`export --rank 16` of a file of 209 MB": "export --rank 16, 209 MB file",
        "one layer, in Python": "reorder one layer, 3072 x 3072, R = 64",
    }
    commands = read("benchmarks/results/file_commands.json")["commands"]
    rows: list[list[str]] = []
    for label, name in names.items():
        usage = commands[name]
        memory = f"{usage['peak_MiB']:.0f}" if "peak_MiB" in usage else ""
        rows.append([label, f"{usage['cpu_seconds']:.2f}", memory])
    return table(["", "CPU seconds", "peak MiB"], rows)


@block
def resize() -> str:
    """CPU seconds, memory and errors of the tools that truncate a single file."""
    labels = {
        "export": "`export --rank 8`",
        "kohya": "kohya's script, full SVD",
        "kohya, lowrank": "kohya's newer script",
        "KJNodes": "KJNodes' LoraReduceRank",
    }
    files = read("benchmarks/results/resize.json")["files"]
    rows: list[list[str]] = []
    for tool, label in labels.items():
        row = [label]
        for file in ("sdxl", "flux"):
            usage = files[file]["fixed"][tool]
            row += [f"{usage['cpu_seconds']:.2f}", f"{usage['peak_MiB']:.0f}"]
            row.append(f"{100 * usage['error']:.2f}")
        rows.append(row)
    headings = [
        f"{name} ({files[file]['layers']} layers, rank {files[file]['rank']}): CPU seconds"
        for name, file in (("SDXL", "sdxl"), ("Flux", "flux"))
    ]
    columns = [headings[0], "peak MiB", "error, %", headings[1], "peak MiB", "error, %"]
    return table(["", *columns], rows)


@block
def resize_by_layer() -> str:
    """Errors of the ways of choosing a rank for each layer, and of `export` at the same size."""
    rows: list[list[str]] = []
    for name, usage in read("benchmarks/results/resize.json")["chosen"].items():
        tool, _, method = name.partition(", ")
        method, _, parameter = method.partition(" ")
        size = f"{usage['bytes'] / 1e6:.2f}"
        errors = [f"{100 * usage[key]:.1f}" for key in ("error", "error of export")]
        rows.append([f"{tool}, `{method}` {parameter}", size, *errors])
    return table(["chosen by", "MB", "error, %", "`export --max-bytes`, %"], rows)
