"""What docs/gla.md points to is there: functions by the file that defines them, gates by their names."""

import ast
import re
from pathlib import Path

from gla_ablate.model import GATES

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "gla.md").read_text(encoding="utf-8")
FORMS = ("recurrent", "parallel", "chunkwise", "two_level", "channel_scores", "scan_kernel", "products_kernel")


def test_every_function_named_in_the_derivation_is_defined_in_the_file_it_links_to():
    links = set(re.findall(r"\[`(\w+)`\]\(([^)]+\.py)\)", TEXT))
    assert set(FORMS) <= {name for name, _ in links}
    for name, target in sorted(links):
        tree = ast.parse((DOCS / target).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name in defined, f"{target} defines no {name}"


def test_the_table_of_gates_has_every_gate_of_this_package():
    named = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    ours = [name for name in GATES.names() if GATES[name].__module__.startswith("gla_ablate.")]
    assert sorted(named) == sorted(ours)


def test_math_is_written_so_that_github_shows_it():
    fences = re.findall(r"```math\n(.+?)\n```", TEXT, re.DOTALL)
    inline = re.findall(r"\$`([^`]+)`\$", TEXT)
    assert len(fences) > 8 and len(inline) > 50
    for formula in fences + inline:
        assert formula.count("{") == formula.count("}"), formula
    rest = re.sub(r"```math\n.+?\n```|\$`[^`]+`\$", "", TEXT, flags=re.DOTALL)
    assert "$" not in rest
