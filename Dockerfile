# The worker's image. torch comes from the base image and is never replaced; everything else comes from the lock.
#
#   docker build -t wmtp-worker .
#   docker build -t wmtp-worker --build-arg BASE_IMAGE=... .      another CUDA, another registry, a digest
#
# docs/container.md has the rest.
ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime

# --- the environment: the locked requirements, before the base's own packages on the path -------------------
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS environment
COPY docker/check_base.py requirements/runtime.txt /tmp/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 /tmp/check_base.py \
    && python3 -m venv --without-pip /opt/wmtp/venv \
    && python3 -m pip --python /opt/wmtp/venv install --no-deps --require-hashes -r /tmp/runtime.txt \
    && python3 /tmp/check_base.py --folder >"$(echo /opt/wmtp/venv/lib/python3*/site-packages)/torch-of-the-base.pth" \
    && /opt/wmtp/venv/bin/python /tmp/check_base.py

# --- the package: a wheel, built with what the lock has ----------------------------------------------------
FROM environment AS package
WORKDIR /source
COPY pyproject.toml LICENSE README.md ./
COPY configs configs
COPY wmtp_worker wmtp_worker
RUN python3 -m pip --python /opt/wmtp/venv wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

# --- the image ---------------------------------------------------------------------------------------------
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS worker
# which tini is the distribution's business
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*

# uid 1000 by default; some bases have a user of that number already
RUN if taken=$(getent passwd 1000); then userdel --remove "${taken%%:*}" 2>/dev/null; fi \
    && useradd --uid 1000 --user-group --create-home --shell /bin/bash wmtp \
    # any other user may write here too: docker run --user
    && install -d -o 1000 -g 1000 -m 1777 /workspace

COPY --from=environment /opt/wmtp/venv /opt/wmtp/venv
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    python3 -m pip --python /opt/wmtp/venv install --no-cache-dir --no-index --no-deps /wheels/*.whl
COPY --chmod=755 entrypoint /opt/wmtp/entrypoint

ENV PATH=/opt/wmtp/venv/bin:/opt/wmtp/entrypoint:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    WMTP_IMAGE=1 \
    WMTP_WORKDIR=/workspace

ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
# for the record of each run
ENV WMTP_GIT_COMMIT=${REVISION}
LABEL org.opencontainers.image.title="wmtp-worker" \
      org.opencontainers.image.description="Trains weighted multi-token prediction models and survives the loss of its machine" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

WORKDIR /workspace
VOLUME /workspace
USER 1000:1000

# the training beats every few seconds; a model may take minutes to arrive before the first beat
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 CMD ["health.sh"]
ENTRYPOINT ["tini", "-g", "--", "entrypoint.sh"]
CMD ["train"]
