# A GPU node's image: CUDA 13.0 with nvcc, so that the extension's CUDA part is built. Not built by us yet.
#   docker build -t sslr1 .
#   docker run --gpus all --ipc=host -v /my/photos:/photos -v /models:/models -v "$PWD/runs:/workspace/runs" sslr1 \
#       torchrun --nproc_per_node=8 -m sslr1.train configs/qwen2.5-vl-3b.yaml model.path=/models/Qwen2.5-VL-3B-Instruct data.path=/photos
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# gcc and Python's headers are needed when Triton compiles its launchers, not only here
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

WORKDIR /workspace
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY sslr1 sslr1
RUN pip install --no-cache-dir -c constraints.txt -e '.[export]'
COPY configs configs
COPY examples examples
