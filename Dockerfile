# The CUDA environment. The code is mounted when the image runs; docs/install.md has the commands:
#   docker run --rm -it --gpus all -v "$PWD:/idr" idr-nnabla
# Docker passes --build-arg http_proxy=... to every RUN by itself.

# Ubuntu 20.04 has Python 3.8, which nnabla 1.22.0 and 1.39.0 both support.
FROM nvidia/cuda:11.8.0-cudnn8-runtime-ubuntu20.04

# nnabla-ext-cuda110 loads libraries of CUDA 11.8, and one of CUDA 11.0: libcusolver.so.10.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        libcusolver-11-0 libgomp1 libopenmpi-dev openmpi-bin python-is-python3 python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && echo /usr/local/cuda-11.0/targets/x86_64-linux/lib > /etc/ld.so.conf.d/cusolver-11-0.conf \
    && ldconfig

# nnabla's communicator loads lib/libmpi.so from this folder.
ENV OMPI_HOME=/usr/lib/x86_64-linux-gnu/openmpi

# requirements.txt pins nnabla 1.39.0, NumPy and h5py; other versions of nnabla choose their own NumPy and h5py.
# Versions before 1.35 do not declare that they need NumPy < 1.24 and protobuf < 3.21. Ubuntu's pip is too old.
ARG NNABLA_VER=1.39.0
COPY requirements.txt /tmp/
RUN case ${NNABLA_VER} in 1.[12]?.*|1.3[0-4].*) numpy="numpy<1.24" ;; *) numpy=numpy ;; esac \
    && grep -v -E '^(nnabla|numpy|h5py)==' /tmp/requirements.txt > /tmp/others.txt \
    && python3 -m pip install --no-cache-dir "pip>=23" \
    && python3 -m pip install --no-cache-dir -r /tmp/others.txt \
        "nnabla==${NNABLA_VER}" "nnabla-ext-cuda110==${NNABLA_VER}" "${numpy}" "protobuf<3.21" \
    && python3 -c "import nnabla"

# Stop the build if the extension lacks a library. libcuda comes from the driver when the image runs.
RUN ldd /usr/local/lib/python3.8/dist-packages/nnabla_ext/cuda/libnnabla_cuda*.so > /tmp/libraries \
    && ! grep "not found" /tmp/libraries | grep -v -e libcuda.so -e libnnabla.so

WORKDIR /idr
