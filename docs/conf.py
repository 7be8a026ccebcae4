"""How Sphinx makes the guide out of these pages; see `make docs`."""

import mha_fast

project = "mha_fast"
version = release = mha_fast.__version__
html_title = f"mha_fast {version}"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "numpydoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "py:obj"  # so `attention` in a docstring is a link
nitpick_ignore_regex = [  # and `mask`, an argument, is none
    ("py:obj", r"\w+|nn\.\w+|\w+\(.*\)"),
    ("py:.*", r"(numpy|onnx|onnxruntime|transformers)\..*"),
]
autodoc_mock_imports = ["torch", "transformers"]  # too heavy to build the guide
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_copy_empty_lines = False

html_theme = "pydata_sphinx_theme"
html_theme_options = {
    "navbar_center": [],
    "secondary_sidebar_items": {"**": [], "api": ["page-toc"]},
    "footer_start": [],
    "footer_end": [],
}
html_sidebars = {"**": ["pages.html"]}
html_show_sourcelink = False
