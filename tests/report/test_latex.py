"""table.tex: what is in its cells; compiled by LaTeX where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qexp.report.comparison import prepare_compared, read_all_samples
from qexp.report.latex import escape_latex, table_tex
from qexp.report.selection import select
from tests.report.factory import ENV, GENERATE, config, job, manifest, run_folder, sweep_of_seeds, sweep_of_six

HARD = r"50% of a_b & {c} #1 ^ ~ \ $x$ <y> |z| [1] * `q` -- 'r' ± × → ≤ … é ł † 你 ∞"


def tex_of(outputs: Path, name: str = "first", baseline: str | None = None) -> str:
    rows = select(outputs, [name]).rows
    list(read_all_samples(rows))
    return table_tex(prepare_compared(rows, baseline))


def body(text: str) -> list[list[str]]:
    """Cells of the lines between \\midrule and \\bottomrule."""
    lines = text.partition("\\midrule\n")[2].partition("\\bottomrule")[0].splitlines()
    return [line.removesuffix(r" \\").split(" & ") for line in lines]


def heads(text: str) -> list[str]:
    return text.partition("\\toprule\n")[2].partition(r" \\")[0].split(" & ")


def test_header_has_units_and_n_and_failures_are_counted(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    for path in tmp_path.glob("runs/*/result.json"):
        path.write_text(path.read_text().replace('"quality/ssim"', '"quality/images": 200, "quality/ssim"'))
    text = tex_of(tmp_path)
    assert {"weights (MiB)", "PSNR (dB)", "SSIM ($n=200$)", "bits/q. weight"} <= set(heads(text))
    assert text.startswith("% \\usepackage{booktabs}\n% 2 rows without a result are left out\n\\begin{tabular}{ll")
    first, *_, last = (dict(zip(heads(text), line, strict=True)) for line in body(text))
    assert (first["backend"], first["offload"], first["PSNR (dB)"]) == ("bitsandbytes nf4", "none", "24.50")
    assert (last["offload"], last["PSNR (dB)"]) == (r"leaf$\rightarrow$disk", "exact")


def test_seeds_are_mean_and_deviation(tmp_path: Path) -> None:
    text = tex_of(tmp_path, sweep_of_seeds(tmp_path))
    nf4 = dict(zip(heads(text), body(text)[0], strict=True))
    assert (nf4["PSNR (dB)"], nf4["seeds"]) == (r"20.00 $\pm$10.00", "3")  # 10, 20 and 30


def test_numbers_are_as_in_print(tmp_path: Path) -> None:
    metrics = {"memory/weights_gib": 0.004, "quality/relative_l2": 1.2e-4, "quality/frechet_distance": -0.5}
    times = {"time/step_ms": 12.0, "time/step_ms_min": 11.5, "time/step_ms_max": 14.25}
    run_folder(tmp_path, "a", config(), metrics | times)
    manifest(tmp_path, "first", [job(1, "a", [])])
    cells = dict(zip(heads(text := tex_of(tmp_path)), body(text)[0], strict=True))
    assert cells["relative L2"] == r"1.20$\times10^{-4}$"
    assert cells["Fréchet distance"] == "$-$0.50"
    assert cells["step (ms)"] == "12.0 (11.5--14.2)"


def test_marks_are_raised_and_explained_below(tmp_path: Path) -> None:
    for key, version in (("a", "2.13.0"), ("b", "2.13.0"), ("c", "2.14.0")):
        folder = run_folder(tmp_path, key, config("quanto", key), GENERATE | {"time/other_cores": 1.5 * (key == "a")})
        result = (folder / "result.json").read_text()
        (folder / "result.json").write_text(
            result.replace(f'"torch": "{ENV["versions"]["torch"]}"', f'"torch": "{version}"')
        )
    manifest(tmp_path, "first", [job(n, key, [f"backend={key}"]) for n, key in enumerate("abc", 1)])
    text = tex_of(tmp_path)
    lines = {line[1]: line for line in body(text)}
    assert set(lines) == {"quanto a", "quanto b", r"quanto c$^{\dag}$"}
    assert "12.0$^{*}$" in lines["quanto a"] and "12.0" in lines["quanto b"]
    notes = text.partition("\\bottomrule\n")[2]
    assert r"{\footnotesize $^{*}$ times were taken" in notes and r"$^{\dag}$ \#3: torch 2.14.0" in notes


def test_table_without_results_and_one_of_many_rows(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config(), None, "failed", "load", "no such file")
    manifest(tmp_path, "first", [job(0, "a", [], "failed", reason="load")])
    assert tex_of(tmp_path).splitlines()[-1] == "% no row has a result"
    jobs = []
    for number in range(46):
        run_folder(tmp_path, f"k{number}", config("quanto", f"t{number}"), GENERATE)
        jobs.append(job(number, f"k{number}", []))
    manifest(tmp_path, "many", jobs)
    text = tex_of(tmp_path, "many")
    assert text.count("longtable}") == 3 and "\\midrule\n\\endhead\n" in text and len(body(text)) == 47


def test_every_special_character_is_escaped() -> None:
    escaped = escape_latex(HARD)
    plain = re.sub(
        r"\\(textbackslash|textasciicircum|textasciitilde|textless|textgreater|textbar|ldots|textasciigrave)\{\}",
        "",
        escaped,
    )
    plain = re.sub(r"\$[^$]*\$(?=\W|$)", "", re.sub(r"\\[{}$&#%_]", "", plain))
    assert not set(plain) & set("%&#_^~<>|$\\")
    assert "[U+4F60]".replace("[", "{[}").replace("]", "{]}") in escaped
    assert "-{}-" in escaped and "é ł" in escaped


@pytest.mark.external
@pytest.mark.parametrize("program", ["pdflatex", "lualatex"])
def test_latex_compiles_the_table(program: str, tmp_path: Path) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing; apt-get install texlive-latex-recommended texlive-luatex fonts-lmodern")
    jobs = []
    for number in range(50):
        container = config("quanto", HARD if number == 3 else f"t{number}")
        run_folder(tmp_path, f"k{number}", container, GENERATE | {"time/other_cores": 1.5 * (number == 1)})
        jobs.append(job(number, f"k{number}", [f"a={HARD}" if number == 3 else f"a={number}"]))
    manifest(tmp_path, "many", jobs)
    manifest(tmp_path, "few", jobs[:10])
    for name in ("few", "many"):
        (tmp_path / f"{name}.tex").write_text(tex_of(tmp_path, name, "quanto t0"), encoding="utf-8")
    document = (
        r"\documentclass{article}\usepackage{booktabs,longtable}\usepackage[landscape,margin=1cm]{geometry}"
        r"\begin{document}\begin{table}\centering\tiny\input{few}\end{table}\tiny\input{many}\end{document}"
    )
    (tmp_path / "paper.tex").write_text(document)
    command = [program, "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, errors="replace")
    assert done.returncode == 0, done.stdout[-3000:]
    log = (tmp_path / "paper.log").read_text(errors="replace")
    assert "Missing character" not in log and "Undefined control" not in log
