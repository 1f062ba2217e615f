"""The command: one table of verbs. Each verb imports what it needs when it is called, so that help comes at once."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inbrief.io.errors import InbriefError


@dataclass(frozen=True)
class Verb:
    usage: str
    help: str
    call: Callable[[list[str]], None]


def _options(args: list[str], known: dict[str, bool], verb: str) -> tuple[list[str], dict[str, str]]:
    """Split `args` into the rest and the known options; `known` maps a name to whether it takes a value."""
    rest: list[str] = []
    found: dict[str, str] = {}
    queue = list(args)
    while queue:
        word, equals, inline = queue.pop(0).partition("=")
        if word not in known:
            rest.append(word + equals + inline)
        elif not known[word]:
            found[word] = "yes"
        elif equals or queue:
            found[word] = inline if equals else queue.pop(0)
        else:
            raise InbriefError(f"`{word}` needs a value: {VERBS[verb].usage}")
    return rest, found


def _flags(kind: Any, args: list[str], prog: str, description: str, default: Any) -> Any:
    """`default` with flags over it, by tyro. Its boxed messages become one line."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, default=default, args=args, prog=prog, description=description)
    except SystemExit as e:
        if not e.code:
            raise
        words = re.sub(r"[─│╭╮╰╯━┃]+", " ", said.getvalue()).split("For full helptext")[0]
        words = " ".join(words.split())
        # tyro says the box's title again inside; pydantic adds its own types and address.
        words = re.sub(r"^(.+?) \1\b", r"\1", words, flags=re.I)
        words = re.sub(r"Value error Error parsing (\S+): \d+ validation errors? for \w+", r"\1:", words)
        words = re.sub(r" \[type=.*?\] For further information visit \S+", ".", words).replace("Value error, ", "")
        raise InbriefError(f"{words} `{prog} --help` lists the flags.") from None


def _pipeline(verb: str, last: str, args: list[str], preset: str | None = None) -> None:
    """Run the stages up to `last` on a preset, a YAML file or a run folder, with flags over its settings."""
    rest, options = _options(args, {"--out": True}, verb)
    if preset is not None:
        target = preset
    elif rest and not rest[0].startswith("-"):
        target = rest.pop(0)
    elif "--help" in rest or "-h" in rest:
        target = "quickstart"
    else:
        raise InbriefError(f"Name a preset, a YAML file or a run folder: {VERBS[verb].usage}")
    from inbrief import config as settings

    config = settings.load(target)
    if rest:
        prog = f"inbrief {verb}" + ("" if preset else f" {target}")
        flags = _flags(settings.Config, rest, prog, f"{VERBS[verb].help} --out DIR: the run folder.", default=config)
        config = settings.parse(flags.model_dump(), "flags")
    out = options.get("--out")
    resumed = target not in settings.presets() and Path(target).is_dir()
    root = Path(out) if out else Path(target) if resumed else Path("runs") / Path(target).stem
    from inbrief import pipeline

    pipeline.run_stages(config, root, last)
    if last == "report":
        from inbrief.report.terminal import summary

        print(summary(root))
    else:
        print(root)


def _stage(name: str, last: str | None = None) -> Callable[[list[str]], None]:
    return lambda args: _pipeline(name, last or name, args)


def _explain(args: list[str]) -> None:
    known = {"--position": True, "--nla": True, "--seed": True, "--json": False}
    rest, options = _options(args, known, "explain")
    if rest[:1] == ["--"]:
        rest = rest[1:]
    elif rest and rest[0].startswith("-"):
        raise InbriefError(
            f"There is no flag {rest[0]!r} (before a text that begins with a dash, write `--`): {VERBS['explain'].usage}"
        )
    if len(rest) != 1:
        raise InbriefError(f"Give one text: {VERBS['explain'].usage}")
    try:
        position, seed = int(options.get("--position", "-1")), int(options.get("--seed", "0"))
    except ValueError as e:
        raise InbriefError(f"--position and --seed take whole numbers: {e}") from None
    from inbrief.nla import load

    found = load(options.get("--nla")).explain(rest[0], position, seed)
    if "--json" in options:
        print(json.dumps(found.as_dict(), ensure_ascii=False))
        return
    # Explanations are model output: nothing in them may drive a terminal.
    print(re.sub(r"[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f]", "�", found.explanation))
    fidelity = f"FVE {found.fve:.3f}" if found.fve is not None else f"cosine {found.cosine:.3f}"
    note = "" if found.extracted else "  (failed: cut off or unreadable)"
    print(
        f"\n{fidelity}  {found.tokens} tokens  position {found.position} {found.token!r}, layer {found.layer}{note}",
        file=sys.stderr,
    )


def _export(args: list[str]) -> None:
    rest, options = _options(args, {"--out": True, "--dtype": True}, "export")
    dtype = options.get("--dtype", "bfloat16")
    if len(rest) > 1 or "--out" not in options or dtype not in ("bfloat16", "float32"):
        raise InbriefError(f"Name a folder to write to: {VERBS['export'].usage}")
    from inbrief.nla import load

    load(rest[0] if rest else None).save(Path(options["--out"]), dtype)
    print(options["--out"])


def _pretrain(args: list[str]) -> None:
    rest, options = _options(args, {"--out": True}, "pretrain")
    if not rest or rest[0] != "storyworld" or "--out" not in options:
        raise InbriefError(f"Name the corpus and the folder: {VERBS['pretrain'].usage}")
    from inbrief.training.pretrain import Pretrain, pretrain_storyworld

    settings = _flags(Pretrain, rest[1:], "inbrief pretrain storyworld", VERBS["pretrain"].help, default=Pretrain())
    print(json.dumps(pretrain_storyworld(Path(options["--out"]), settings)))


def _accept(args: list[str]) -> None:
    rest, options = _options(args, {"--out": True}, "accept")
    if len(rest) != 1 or rest[0].startswith("-") or "--out" not in options:
        raise InbriefError(f"Name a StoryWorld run folder and a file: {VERBS['accept'].usage}")
    from inbrief.study.acceptance import accept

    print(accept(Path(rest[0]), Path(options["--out"])))


VERBS: dict[str, Verb] = {
    "quickstart": Verb(
        "inbrief quickstart [--out DIR] [--section.field value]",
        "The length-fidelity frontier of StoryWorld, from nothing, in under ten minutes on two cores.",
        lambda args: _pipeline("quickstart", "report", args, preset="quickstart"),
    ),
    "run": Verb(
        "inbrief run PRESET|FILE|RUN [--out DIR] [--section.field value]",
        "All stages; resumes.",
        _stage("run", "report"),
    ),
    "harvest": Verb("inbrief harvest PRESET|FILE|RUN …", "Text to activations.", _stage("harvest")),
    "teach": Verb("inbrief teach PRESET|FILE|RUN …", "Up to the teacher's explanations.", _stage("teach")),
    "warmstart": Verb(
        "inbrief warmstart PRESET|FILE|RUN …", "Up to the warm-started AV and AR, and their gate.", _stage("warmstart")
    ),
    "reinforce": Verb(
        "inbrief reinforce PRESET|FILE|RUN …", "Up to the trained runs, one per λ and seed.", _stage("reinforce")
    ),
    "evaluate": Verb("inbrief evaluate PRESET|FILE|RUN …", "Up to results.json.", _stage("evaluate")),
    "report": Verb("inbrief report PRESET|FILE|RUN …", "Up to the figures and the page.", _stage("report")),
    "explain": Verb(
        'inbrief explain "text" [--position -1] [--nla FOLDER] [--seed 0] [--json]',
        "Explain one activation of a text, with the shipped pair or your own.",
        _explain,
    ),
    "export": Verb(
        "inbrief export [NLA] --out DIR [--dtype bfloat16|float32]",
        "Write a pair's AV and AR in Hugging Face layout; the shipped pair when none is named.",
        _export,
    ),
    "pretrain": Verb(
        "inbrief pretrain storyworld --out DIR [--steps N …]", "Train StoryWorld's target model.", _pretrain
    ),
    "accept": Verb("inbrief accept RUN --out FILE.json", "Measure what StoryWorld's target carries.", _accept),
}


def usage() -> str:
    from inbrief.config import presets

    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "inbrief: train and study Natural Language Autoencoders whose explanations are short.",
            "",
            "usage: inbrief VERB … (`inbrief VERB --help` shows its usage; `inbrief run PRESET --help` every setting)",
            "",
            *lines,
            "",
            f"Presets: {', '.join(presets())}. Run folders go to ./runs/NAME unless --out says otherwise.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 0 when done, 2 for a mistake the user can mend, 130 when interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if args[0] in ("-V", "--version"):
        from inbrief import __version__

        print(__version__)
        return
    name, *rest = args
    try:
        if name not in VERBS:
            import difflib

            near = difflib.get_close_matches(name, VERBS, n=1)
            raise InbriefError(
                f"There is no verb {name!r}."
                + (f" Did you mean {near[0]!r}?" if near else " `inbrief --help` lists them.")
            )
        if rest in (["--help"], ["-h"]) and name != "quickstart":
            print(f"usage: {VERBS[name].usage}\n\n{VERBS[name].help}")
            return
        VERBS[name].call(rest)
    except InbriefError as e:
        print(f"inbrief: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as e:
        print(f"inbrief: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("inbrief: interrupted. A run goes on where it was when the same command is given again.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
