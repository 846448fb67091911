"""Runs analyses one after another, and keeps what each has found as soon as it is done."""

from collections.abc import Sequence

from lightning_drm.analysis import Analysis
from lightning_drm.evaluation import Candidates, StoredFinding
from lightning_drm.training.failures import reason
from lightning_drm.training.progress import AnalysisBar
from lightning_drm.training.run import Run


def run_analyses(run: Run, candidates: Candidates, analyses: Sequence[Analysis]) -> list[StoredFinding]:
    """Runs analyses, prints what each has found, and writes it to the run folder.

    One that cannot be done (a `ValueError`) does not keep the others from being run; a bug ends the command, and what
    was found before it is kept.

    Args:
        run: The run.
        candidates: Its task vectors and the models that are made of them.
        analyses: The analyses.

    Raises:
        ValueError: If options do not fit the tasks, before anything is run; or if an analysis failed, at the end.
    """
    left_out = {analysis.name: why for analysis in analyses if (why := analysis.unavailable(candidates)) is not None}
    if len(left_out) == len(analyses):
        raise ValueError("\n".join(f"{name} cannot be run: {why}." for name, why in left_out.items()))
    for name, why in left_out.items():
        run.say(f"{name} is left out: {why}.")
    analyses = [analysis for analysis in analyses if analysis.name not in left_out]
    problems = [f"{analysis.name}: {problem}" for analysis in analyses for problem in analysis.problems(candidates)]
    if problems:
        raise ValueError("\n".join(problems))
    found: list[StoredFinding] = []
    errors: dict[str, ValueError] = {}
    if any(analysis.needs_scores for analysis in analyses):
        run.interruptible.unfinished = "measuring the finetunes was"
        _ = candidates.individual  # now, since measuring them shows bars of its own
    with AnalysisBar(run.console) as bar:
        for number, analysis in enumerate(analyses):
            run.interruptible.unfinished = f"the analysis {analysis.name} was"
            bar.begin(analysis.name, number, len(analyses))
            try:
                findings = analysis.run(candidates, bar.step)
                found += run.keep("analysis", findings, with_scores=analysis.needs_scores)
                for finding in findings:
                    run.say(f"{finding.title}: {finding.sentence}")
            except ValueError as error:
                errors[analysis.name] = error
                run.say(f"{analysis.name} failed: {reason(error)}")
            run.interruptible.check()
    if found:
        run.say_where("analysis")
    if errors:
        lines = [f"  {name}: {reason(error)}" for name, error in errors.items()]
        summary = "Not all analyses could be run; what the others found is kept.\n" + "\n".join(lines)
        raise ValueError(summary) from next(iter(errors.values()))
    return found
