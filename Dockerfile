# The host site of this repository, ready to serve.

FROM python:3.11-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
WORKDIR /source
COPY pyproject.toml constraints.txt hatch_build.py README.md CHANGELOG.md LICENSE ./
COPY frontend frontend
COPY streaming_chat streaming_chat
RUN /venv/bin/pip install --constraint constraints.txt '.[postgres,site]'

FROM python:3.11-slim
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --system --no-create-home --uid 10001 chat
COPY --from=build /venv /venv
WORKDIR /site
COPY manage.py ./
COPY chatproject chatproject
COPY templates templates
RUN SECRET_KEY=only-for-this-step python manage.py collectstatic --no-input --verbosity 0
USER chat
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
  CMD ["python", "-m", "chatproject.health"]
CMD ["daphne", "--bind", "0.0.0.0", "--port", "8000", "--proxy-headers", "chatproject.asgi:application"]
