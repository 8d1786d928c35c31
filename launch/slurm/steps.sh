# shellcheck shell=bash
# Sourced by the Slurm batch scripts: log folder, steps, waits with deadlines, and one clean end for every outcome.
#
# A step is one srun in the background. Slurm's own srun answers SIGTERM by killing its step on the spot, so a step is
# ended through scancel, which lets launch/slurm/node.py leave in order; srun is only told when that took too long.

node_patience_s=25   # what node.py may take to end what it started; below Slurm's usual KillWait of 30 s
refit_started=()     # names of steps, in the order of their start
kill_on_bad_exit=1    # the first task of a step that fails ends the others; 0 lets each come to its own end
declare -A refit_pid refit_code # srun's process id, and its exit code once it is known, by step name
refit_signal=""

say() { printf 'refit: %s\n' "$*" | tee -a "$logs/batch.log" >&2; }

fail() { say "failed: $*"; exit 1; }

# Sets logs, nodes (array, Slurm's order), python. Everything of the job is under $logs; nothing is installed here.
open_job() {
  local venv="${REFIT_VENV:-$PWD/.venv}"
  [ -n "${SLURM_JOB_ID:-}" ] || { echo "refit: not inside a Slurm job; submit it: sbatch $0" >&2; exit 2; }
  [ -f launch/slurm/node.py ] || { echo "refit: $PWD is not the repository; run sbatch from its root, or sbatch --chdir=ROOT" >&2; exit 2; }
  logs="${REFIT_LOG_ROOT:-$PWD/logs}/$SLURM_JOB_ID"
  mkdir -p "$logs" && logs="$(cd "$logs" && pwd)"
  python="$venv/bin/python"
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  trap 'refit_signal=TERM; say "told to stop: time is nearly up, or the job was cancelled"; exit 143' TERM INT
  trap close_job EXIT
  say "job $SLURM_JOB_ID on ${#nodes[@]} nodes: ${nodes[*]}; logs in $logs"
}

# start_step NAME NODES(comma list) COMMAND...: in the background, one task a node; its output in $logs/NAME-<node>.log
start_step() {
  local name="$1" where="$2" count
  shift 2
  count="$(tr , '\n' <<<"$where" | wc -l)"
  srun --job-name="$name" --nodelist="$where" --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --overlap \
    --mpi=none --kill-on-bad-exit="$kill_on_bad_exit" --input=none --output="$logs/$name-%N.log" "$@" >>"$logs/batch.log" 2>&1 &
  refit_pid[$name]=$!
  refit_started+=("$name")
}

step_runs() { kill -0 "${refit_pid[$1]}" 2>/dev/null; }

# reap NAME: waits for its srun and sets refit_code[NAME], the exit code of its worst task
reap() {
  [ -z "${refit_code[$1]:-}" ] || return 0
  refit_code[$1]=0
  wait "${refit_pid[$1]}" || refit_code[$1]=$?
}

# A sleep that a signal ends at once.
nap() { sleep "$1" & wait $!; }

# wait_step NAME TIMEOUT_S GUARDS...: until NAME ends (0: it may take for ever). The end of a guard is a failure.
wait_step() {
  local name="$1" limit_s="$2" guard begun_s=$SECONDS
  shift 2
  while step_runs "$name"; do
    for guard in "$@"; do
      if ! step_runs "$guard"; then
        reap "$guard"
        say_tail "$guard"
        fail "step $guard ended (code ${refit_code[$guard]}) while step $name was running; see $logs/$guard-*.log"
      fi
    done
    ((limit_s == 0 || SECONDS - begun_s < limit_s)) || fail "step $name took longer than $limit_s s (REFIT_START_TIMEOUT_S); see $logs/$name-*.log"
    nap 1
  done
  reap "$name"
}

say_tail() { # NAME: the end of its logs, so that the reason is in the first file one opens
  tail -n "${2:-12}" "$logs/$1"-*.log 2>/dev/null | tee -a "$logs/batch.log" >&2 || true
}

# end_step NAME TIMEOUT_S: ask, wait, then force. Quiet if it has ended.
end_step() {
  local name="$1" deadline_s=$((SECONDS + $2)) id
  step_runs "$name" || return 0
  id="$(timeout 10 squeue --noheader --steps --job="$SLURM_JOB_ID" --format='%i %j' | awk -v name="$name" '$2 == name {print $1}')"
  [ -z "$id" ] || timeout 10 scancel --signal=TERM "$id" 2>/dev/null || true
  while step_runs "$name"; do
    if ((SECONDS >= deadline_s)); then
      say "step $name did not leave within $2 s; forcing it"
      kill -TERM "${refit_pid[$name]}" 2>/dev/null || true
      return 0
    fi
    sleep 0.5
  done
}

# clean_nodes CODE: a step that was killed outright could not clean up after itself. Not for a job that Slurm is ending:
# it starts no more steps, and its own end of them is what is left.
clean_nodes() {
  [ "$1" != 0 ] && [ -z "$refit_signal" ] && [ -n "${refit_pid[ray-head]:-}" ] || return 0
  start_step clean "$(IFS=,; echo "${nodes[*]}")" "$python" launch/slurm/node.py clean --temp "${REFIT_TEMP:-/tmp}" --logs "$logs"
  local deadline_s=$((SECONDS + node_patience_s))
  while step_runs clean && ((SECONDS < deadline_s)); do sleep 0.5; done
}

# The one way out: steps end in the reverse order of their start, so that the driver leaves before its Ray.
close_job() {
  local code=$? k
  trap '' TERM INT
  trap - EXIT
  for ((k = ${#refit_started[@]} - 1; k >= 0; k--)); do
    end_step "${refit_started[k]}" "$node_patience_s"
    reap "${refit_started[k]}"
  done
  clean_nodes "$code"
  rm -f "$logs/token"
  if [ -n "$refit_signal" ]; then code="${refit_code[driver]:-$code}"; fi
  say "job $SLURM_JOB_ID ends with exit code $code; logs in $logs"
  exit "$code"
}

# Check every node; a failure names it. Sets nothing: launch/slurm/nodes.py writes $logs/nodes.json.
check_nodes() { # PORTS... (numbers that must be free on every node)
  local list timeout_s="${REFIT_START_TIMEOUT_S:-300}"
  [ -x "$python" ] || fail "$python is not there on ${nodes[0]}: set up the environment once before (source launch/setup.sh), on a file system that all nodes see, or name one with REFIT_VENV"
  list="$(IFS=,; echo "${nodes[*]}")"
  rm -rf "$logs/checks" # of an earlier start, where the job was requeued
  start_step check "$list" "$python" launch/slurm/check.py --out "$logs/checks" --ports "$*" \
    --num-cpus "${SLURM_CPUS_ON_NODE:-1}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --temp "${REFIT_TEMP:-/tmp}" \
    --min-memory-gb "${REFIT_MIN_FREE_MEMORY_GB:-4}" --min-disk-gb "${REFIT_MIN_FREE_DISK_GB:-5}"
  local begun_s=$SECONDS
  while step_runs check && ((SECONDS - begun_s < timeout_s)); do nap 0.5; done
  "$python" launch/slurm/nodes.py --checks "$logs/checks" --nodes "$list" --out "$logs/nodes.json" \
    --trainer-nodes "${REFIT_TRAINER_NODES:-0}" 2>&1 | tee -a "$logs/batch.log" >&2 \
    || { say_tail check; fail "nodes are not fit for this job; each is named above"; }
}
