# The CUDA environment; the code is mounted, with IMAGE as README.md names it:
#   docker run --rm -it --gpus all -v "$PWD:/idr" IMAGE
# Docker itself hands --build-arg http_proxy=... to every RUN.

# nnabla 1.22.0 and 1.39.0 have Python 3.8 in common, which is Ubuntu 20.04's.
FROM nvidia/cuda:11.8.0-cudnn8-runtime-ubuntu20.04

# CUDA 11.8 has every library that nnabla-ext-cuda110 loads but one, CUDA 11.0's libcusolver.so.10.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        libcusolver-11-0 libgomp1 libopenmpi-dev openmpi-bin python-is-python3 python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && echo /usr/local/cuda-11.0/targets/x86_64-linux/lib > /etc/ld.so.conf.d/cusolver-11-0.conf \
    && ldconfig

# nnabla's communicator looks for lib/libmpi.so in there.
ENV OMPI_HOME=/usr/lib/x86_64-linux-gnu/openmpi

# requirements.txt names nnabla 1.39.0 with its NumPy and h5py. Each nnabla asks for its own, but before 1.35
# does not say that it needs NumPy < 1.24 and protobuf < 3.21. Ubuntu's pip is too old for its wheels.
ARG NNABLA_VER=1.39.0
COPY requirements.txt /tmp/
RUN case ${NNABLA_VER} in 1.[12]?.*|1.3[0-4].*) numpy="numpy<1.24" ;; *) numpy=numpy ;; esac \
    && grep -v -E '^(nnabla|numpy|h5py)==' /tmp/requirements.txt > /tmp/others.txt \
    && python3 -m pip install --no-cache-dir "pip>=23" \
    && python3 -m pip install --no-cache-dir -r /tmp/others.txt \
        "nnabla==${NNABLA_VER}" "nnabla-ext-cuda110==${NNABLA_VER}" "${numpy}" "protobuf<3.21" \
    && python3 -c "import nnabla"

# A library that the extension lacks ends the build here; libcuda comes with the driver, when the image runs.
RUN ldd /usr/local/lib/python3.8/dist-packages/nnabla_ext/cuda/libnnabla_cuda*.so > /tmp/libraries \
    && ! grep "not found" /tmp/libraries | grep -v -e libcuda.so -e libnnabla.so

WORKDIR /idr
