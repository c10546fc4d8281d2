"""An audit as a page for the person responsible for the data. One HTML file without scripts, pictures or links."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from edge_dfcil.model.statistics import ROLES
from edge_dfcil.privacy.audit import NO_PROMISE, Attack, Audit, Nearest

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
body { color: #1b1b1b; background: #fff }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { border-bottom: 1px solid #c8c8c8; padding: .35rem .6rem .35rem 0; text-align: left; vertical-align: top }
td + td, th + th { text-align: right }
@media (prefers-color-scheme: dark) { body { color: #eee; background: #161616 } th, td { border-color: #444 } }
"""
_MEANINGS = {
    "weight": "Weights of the network, trained on all images. No single image is stored in them, but each may leave traces.",
    "batchnorm statistic": "Means and variances inside the network, over all images.",
    "batchnorm counter": "Counters of training steps.",
    **{name: role.meaning for name, role in ROLES.items()},
}


def page(audit: Audit, title: str) -> str:
    """The page, for a model that `title` names."""
    parts = [
        f"<h1>Privacy audit of {escape(title)}</h1>",
        f"<p>The model knows {len(audit.classes)} classes. It stores no image, no feature of a single image, and no image "
        "generator besides its own weights. It stores:</p>",
        _table(("role", "what it is", "bytes"), [_role(audit, role) for role in audit.bytes_by_role]),
        "<h2>Can someone find out whether an image was used?</h2>",
        f"<p>{audit.members} images used in training were compared with {audit.others} other images of the same classes. "
        f"The model classifies {audit.accuracy[0]:.1%} of the first and {audit.accuracy[1]:.1%} of the others correctly; the "
        "wider this gap, the easier an attack.</p>",
        _table(
            ("attack", "right in a pair", "true positives at 1 % false positives", "at 0.1 %"),
            [_attack(a) for a in audit.attacks],
        ),
        "<p>An attacker sees one image that was used and one that was not, and says which was used: 50 % is chance. The other "
        "columns are the share of used images that are found at this share of false alarms. &ldquo;-&rdquo; means that there "
        "were too few images. Attacks with class statistics use what the file stores in addition to the network.</p>",
        *(_by_task(audit) if len(audit.attacks[0].by_task) > 1 else []),
        *(_generated(audit.nearest) if audit.nearest else []),
        "<h2>What this does not say</h2>",
        f"<p>{NO_PROMISE} The attacks are known ones, by an attacker who has such images: a better attack may find more.</p>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = "".join(f'<th scope="col">{escape(one)}</th>' for one in head)
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _role(audit: Audit, role: str) -> tuple[str, str, str]:
    fewest = [number for one in audit.kept if one.kind == role for number in one.images or () if number]
    images = f" At least {min(fewest)} images are behind each." if fewest else ""
    return role.replace("_", " "), _MEANINGS[role] + images, f"{audit.bytes_by_role[role]:,}"


def _attack(one: Attack) -> tuple[str, ...]:
    found = ("-" if share is None else f"{share:.1%}" for share in one.found.values())
    return one.name, f"{one.auc:.1%} ± {one.error:.1%}", *found


def _by_task(audit: Audit) -> list[str]:
    tasks = range(len(audit.attacks[0].by_task))
    rows = [[one.name, *("-" if value is None else f"{value:.1%}" for value in one.by_task)] for one in audit.attacks]
    return ["<p>The same by task, in the order learnt:</p>", _table(["attack", *(f"task {n + 1}" for n in tasks)], rows)]


def _generated(nearest: Sequence[Nearest]) -> list[str]:
    rows = [(one.space, str(one.generated), f"{one.nearer:.1%}", f"{one.member:.3g}", f"{one.other:.3g}") for one in nearest]
    return [
        "<h2>Do generated images show images that were used?</h2>",
        "<p>Images can be generated from any such model. Each was compared with images that were used and with as many others of "
        "its class. If generated images are not copies, about half of them are nearest to a used one.</p>",
        _table(("compared by", "generated", "nearest to a used one", "median distance", "to others"), rows),
    ]
