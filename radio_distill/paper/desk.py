"""What tables and figures share: where things lie, the teachers, and upsamplers and students, which are trained when they are toys.

Real upsamplers and students take a cluster: what is missing is listed, each with the command that trains it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..config.cards import TeacherCard
from ..config.load import load, load_card, load_upsampler_recipe
from ..config.upsampler import Network
from ..data.held_out import TOY, HeldOut
from ..errors import RadioDistillError
from ..jobs import train
from .card import OWN, Common, Row, load_paper, parse_row

__all__ = ["STUDENTS", "Desk"]

log = logging.getLogger(__name__)

STUDENTS = {"baseline": "stage3", "tile": "stage3_tile", "s2": "stage3_s2", "featup": "stage3_featup", "featsharp": "stage3_featsharp"}  # fmt: skip
"""The paper's students of stage 3, and their recipes."""
TOY_TEACHERS = ("toy_clip", "toy_siglip")
"""Those whose targets are upsampled in the toy recipes, and where these look for the upsamplers' weights."""
SCENES, SCENE_PX, QUICK_SCENES = 320, 352, 16
TOY_STEPS, QUICK_STEPS = 60, 1


@dataclass(frozen=True)
class Desk:
    """The settings of the command (see command.py)."""

    run: Path
    teachers: tuple[str, ...] = ()
    data: str = TOY
    images: str = TOY
    students: str = ""
    vlms: str = ""
    preset: str = ""
    limit: int | None = None
    steps: int = TOY_STEPS
    seed: int = 0
    quick: bool = False

    @property
    def results(self) -> Path:
        return self.run / "results.jsonl"

    @property
    def toys(self) -> Path:
        """Where toys that are trained lie: in the run, those of other steps than usual apart, so that none is taken for another."""
        if self.quick:
            return self.run / "quick"
        return self.run if self.steps == TOY_STEPS else self.run / f"steps-{self.steps}"

    @property
    def scenes_folder(self) -> Path:
        return self._made / "scenes"

    @property
    def _made(self) -> Path:
        """Where what toys learn from lies; with `quick` there is less of it."""
        return self.toys if self.quick else self.run

    @property
    def device(self) -> str:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def of(self, entry: Common) -> tuple[str, ...]:
        """Teachers of a table or figure: those of the command line, else toys; with `quick` one."""
        return self.teachers or (entry.toys[:1] if self.quick else entry.toys)

    def held_out(self, most: int) -> HeldOut:
        """The first images of `images`; with `limit` or `quick` fewer."""
        return HeldOut(self.images, min(most, self.limit or most, 2 if self.quick else most), exact=False)

    def rows(self, entry: Common) -> list[Row]:
        """What is compared; with `quick` the first row and the last three."""
        rows = [parse_row(text) for text in entry.rows]
        return [*rows[:1], *rows[1:][-3:]] if self.quick else rows

    @property
    def names(self) -> list[str]:
        """The students; with `quick` two of them."""
        return ["baseline", "featsharp"] if self.quick else list(STUDENTS)

    def upsamplers(self, teacher: str, rows: Sequence[Row]) -> dict[Row, Path]:
        """Folders of trained upsamplers of a teacher. Toys that are missing are trained; raises RadioDistillError listing others,
        with the commands that train them."""
        card = load_card(teacher)
        folders = {row: self.upsampler_folder(teacher, row) for row in rows if row.name != OWN}
        missing = list({folder: row for row, folder in folders.items() if not _is_trained(folder)}.values())
        if missing and not _is_toy(teacher):
            lines = [f"  {_command(card, row, folders[row])}" for row in missing]
            raise RadioDistillError(
                f"{len(missing)} upsamplers of {teacher} are not in {self.run / 'upsamplers'}; train them first:\n"
                + "\n".join(lines)
            )
        for row in missing:
            self._train_upsampler(card, row, folders[row])
        return folders

    def upsampler_folder(self, teacher: str, row: Row) -> Path:
        """Where the upsampler of a row lies, or will lie; rows of equal settings share it (`random` takes its network alone)."""
        settings = load_paper().upsamplers
        name = next(name for name in settings if settings[name] == settings[row.name])
        place = (self.toys if _is_toy(teacher) else self.run) / "upsamplers"
        return place / f"{teacher}-{row._replace(name=name).label}"

    def network(self, teacher: str, row: Row) -> Network:
        """The network of a row, by the recipe that trains it."""
        settings = [f"network.factor={row.factor}", *load_paper().upsamplers[row.name], "data.sources.none.path=none"]
        size = load_card(teacher).input.size
        return load_upsampler_recipe("toy/upsampler/toy_clip", [f"teacher={teacher}", f"size={size}", *settings]).network

    def models(self, teacher: str, rows: Sequence[Row]) -> list[tuple[Row, str, int]]:
        """For each row the model as the evaluation names it, and how many times the task's size its network sees; a teacher of one
        size has no row of a larger input."""
        folders, resizable = self.upsamplers(teacher, rows), load_card(teacher).input.resizable
        found = []
        for row in rows:
            if row.name == OWN and (resizable or row.factor == 1):
                found.append((row, f"teacher:{teacher}", row.factor))
            elif row.name != OWN:
                how = "random" if row.name == "random" else "featsharp"
                found.append((row, f"teacher:{teacher}+{how}:{folders[row]}", 1))
        return found

    def student_folder(self, name: str) -> Path:
        """Where a student lies, or will lie."""
        return (Path(self.students) if self.students else self.toys / "students") / name

    def student(self, name: str) -> Path:
        """The folder of a student: of `students`, or a toy that is trained."""
        folder = self.student_folder(name)
        if folder.is_dir() and (self.students or _is_trained(folder)):
            return folder
        if self.students or self.data != TOY:
            raise RadioDistillError(
                f"{folder} does not exist; expected the run of {STUDENTS[name]} (or a link to it) there: radio-distill train "
                f"{STUDENTS[name]} run={folder} ..., then students={folder.parent}"
            )
        self._train_student(name, folder)
        return folder

    def vlm(self, name: str) -> Path:
        """The folder of the VLM whose tower is a student: of `vlms`, or a toy that is trained."""
        folder = (Path(self.vlms) if self.vlms else self.toys / "vlms") / name
        if _is_trained(folder) or (folder / "config.json").is_file():
            return folder
        if self.vlms or self.data != TOY:
            raise RadioDistillError(
                f"{folder} holds no VLM; Table 6 needs one for each student: train vlm/llava15_projector, then vlm/llava15_sft "
                f"(docs/vlm.md) with run={folder}, then vlms={folder.parent}"
            )
        self._train_vlm(name, folder)
        return folder

    @cached_property
    def scenes(self) -> Path:
        """What toys learn from."""
        from ..toyworld import write_toyworld

        folder, few = self.scenes_folder, self.quick
        if not folder.exists():
            log.info("rendering scenes into %s", folder)
            write_toyworld(folder, count=QUICK_SCENES if few else SCENES, size=SCENE_PX, seed=900, shards=2 if few else 8)
        return folder

    def _train_upsampler(self, card: TeacherCard, row: Row, run: Path) -> None:
        steps = QUICK_STEPS if self.quick else self.steps * row.longer
        overrides = [
            f"teacher={card.name}", f"size={card.input.size}", f"network.factor={row.factor}", *load_paper().upsamplers[row.name],
            *self._short(run, steps), f"optim.warmup={min(6, steps)}", f"data.sources.scenes.path={self.scenes}",
        ]  # fmt: skip
        log.info("training %s", run.name)
        _train("toy/upsampler/toy_clip", overrides)

    def _train_student(self, name: str, run: Path) -> None:
        steps = QUICK_STEPS if self.quick else self.steps
        overrides = ["start={kind: timm, source: toy/trunk.safetensors}", f"data.sources.scenes.path={self.scenes}"]
        overrides += [*self._short(run, steps), f"optim.warmup={min(6, steps)}", f"optim.freeze_trunk={min(6, steps - 1)}"]
        if name in ("featup", "featsharp"):
            for teacher in TOY_TEACHERS:
                weights = self.upsamplers(teacher, [Row(name, 3, 1)])[Row(name, 3, 1)]
                cells = ("low", "high") if name == "featsharp" else ("high",)  # the de-bias map in both
                overrides += [f"partitions.{cell}.teachers.{teacher}.upsampler.weights={weights}" for cell in cells]
        log.info("training the student %s", run.name)
        _train(f"toy/{STUDENTS[name]}", overrides)

    def _train_vlm(self, name: str, run: Path) -> None:
        from ..vlm.toy import write_toy

        parts, before = self._made / "toy_vlm", run.with_name(f"{name}-projector")
        if not parts.exists():
            if self.quick:
                write_toy(parts, count=QUICK_SCENES, steps=0)
            else:
                write_toy(parts, count=1500)
        settings = {"toy/vlm_projector": (before, [f"start.student={self.student(name)}", f"start.lm={parts / 'lm'}"]),
                    "toy/vlm_sft": (run, [f"start.source={before}"])}  # fmt: skip
        for recipe, (folder, start) in settings.items():
            overrides = [*start, f"run={folder}", f"data.sources.toy.path={parts / 'questions.json'}"]
            overrides += [f"data.sources.toy.images={parts / 'images'}", f"seed={self.seed}"]
            if self.quick:
                overrides += ["optim.steps=1", "optim.warmup=1", "samples=2", "log.every=1"]
            elif self.steps != TOY_STEPS:
                usual = load(recipe, overrides, training=True).optim
                steps = max(1, round(usual.steps * self.steps / TOY_STEPS))
                overrides += [f"optim.steps={steps}", f"optim.warmup={min(usual.warmup, steps)}"]
            _train(recipe, overrides)

    def _short(self, run: Path, steps: int) -> list[str]:
        window = ["balance.window=2"] if self.quick else []
        return [f"run={run}", f"seed={self.seed}", f"optim.steps={steps}", f"log.every={steps}", "log.pictures=0",
                f"checkpoint.every={steps}", *window]  # fmt: skip


def _train(recipe: str, overrides: Sequence[str]) -> None:
    import torch

    with torch.enable_grad():  # pictures are drawn without gradients
        train(load(recipe, overrides, training=True))


def _is_toy(teacher: str) -> bool:
    return teacher.startswith("toy_")


def _is_trained(folder: Path) -> bool:
    return (folder / "checkpoints" / "latest").exists() or (folder / "upsampler.safetensors").exists()


def _command(card: TeacherCard, row: Row, run: Path) -> str:
    """How a real upsampler is trained: the paper's preset, on a machine with GPUs."""
    settings = " ".join(f"'{s}'" if "[" in s else s for s in load_paper().upsamplers[row.name])
    steps = " optim.steps=3000" if row.longer == 1 else ""
    base = (
        f"radio-distill upsampler upsampler/dfn_clip_2x name={run.name} teacher={card.name} size={card.input.size} preset=paper"
    )
    return f"{base} network.factor={row.factor} {settings}{steps} run={run} --ranks 8 'data.sources.sa1b.path=SHARDS/{{0000..9999}}.tar'"
