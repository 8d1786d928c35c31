# Sourced by the other launch scripts: makes .venv with the pinned CPU environment, once, and activates it.
# A stamp of the pins makes every later call a no-op. REFIT_VENV chooses another folder.
# Needs: some Python 3.12 (python3.12, pyenv or uv) and a package index that pip is configured for.

refit_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
refit_venv="${REFIT_VENV:-$refit_root/.venv}"

refit_find_python() {
  local candidate
  for candidate in python3.12 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  if command -v uv >/dev/null 2>&1 && uv python find 3.12 2>/dev/null; then
    return 0
  fi
  echo "refit: no Python 3.12 found (tried python3.12, python3, pyenv, uv); install one and run this again" >&2
  return 1
}

refit_setup() {
  local stamp want python
  stamp="$refit_venv/.refit-stamp"
  want="$(cat "$refit_root/requirements/cpu.txt" "$refit_root/pyproject.toml" | sha256sum | cut -d' ' -f1)"
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
    python="$(cd "$refit_root" && refit_find_python)" || return 1
    echo "refit: setting up $refit_venv (about 7 GB, once)" >&2
    if [ ! -x "$refit_venv/bin/python" ]; then
      (cd "$refit_root" && "$python" -m venv "$refit_venv") || return 1
    fi
    "$refit_venv/bin/python" -m pip install --quiet --disable-pip-version-check uv || return 1
    # The list is complete and pinned, so nothing is resolved here: megatron-bridge's GPU-only needs stay out.
    "$refit_venv/bin/uv" pip install --quiet --python "$refit_venv/bin/python" --no-deps \
      -r "$refit_root/requirements/cpu.txt" || return 1
    "$refit_venv/bin/uv" pip install --quiet --python "$refit_venv/bin/python" --no-deps \
      -e "$refit_root" || return 1
    echo "$want" >"$stamp"
  fi
  export PATH="$refit_venv/bin:$PATH" VIRTUAL_ENV="$refit_venv"
  # A job starts five processes that import vLLM or Megatron; with cached bytecode each saves 5 to 10 s.
  unset PYTHONDONTWRITEBYTECODE
}

refit_setup
