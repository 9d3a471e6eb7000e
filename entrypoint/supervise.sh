# shellcheck shell=bash
# What start.sh does around `wmtp train`: reads what the host hid, starts it again where nobody else does, and stops the
# machine at the end if it was told to. Source it after lib.sh; it only defines functions.

SHORTEST_PAUSE=5 # seconds before the first restart; each further one takes twice as long
LONGEST_PAUSE=300
ASK_AGAIN=300 # seconds after which a host that could not be asked to stop the machine is asked again

# --- what the container was started with ---------------------------------------------------------------------

# Hosts whose ssh sessions and start scripts lack the container's variables; its first process has them.
HOST_MARKS="WMTP_IMAGE CONTAINER_ID VAST_CONTAINERLABEL RUNPOD_POD_ID"
# not NVIDIA_*: those are for who makes the container
ADOPTED='^(WMTP|CLOUD|AWS|AZURE|GOOGLE|HF|MLFLOW|RUNPOD|VAST|CONTAINER|NCCL|CUDA|(PY)?TORCH)_[A-Za-z0-9_]*$|^(S3_)?BUCKET_NAME$|^DATA_DIRECTORY$|^(OMP|RAYON)_NUM_THREADS$|^((http|https|no)_proxy|(HTTP|HTTPS|NO)_PROXY)$'

container_workdir= # where the container's own worker trains, whatever this one was told

# Takes over what the worker heeds from the first process, where our own environment lacks it; never replaces anything.
adopt_environment() {
  local file=${1:-/proc/1/environ} entry name hidden='' path=''
  local names=() entries=()
  # readable to its own user and root alone
  while IFS= read -r -d '' entry; do
    name=${entry%%=*}
    [[ " $HOST_MARKS " == *" $name "* && -z ${!name:-} ]] && hidden=1
    [[ $name == PATH ]] && path=${entry#*=}
    [[ $name == WMTP_WORKDIR ]] && container_workdir=${entry#*=}
    [[ $name =~ $ADOPTED ]] && names+=("$name") && entries+=("$entry")
  done < <(cat "$file" 2>/dev/null)
  [[ -n $hidden ]] || return 0
  local number
  for ((number = 0; number < ${#names[@]}; number++)); do
    name=${names[number]}
    if [[ -z ${!name+set} ]]; then
      export "${entries[number]}"
      # the image's own programs go first, as they do for its first process
      if [[ $name == WMTP_IMAGE && -n $path ]]; then export PATH=$path:$PATH; fi
    fi
  done
}

# Sets $1 to what the environment, else the .env file that wmtp reads too, else $2 says.
setting() {
  local name=$1 file=${WMTP_ENV_FILE:-.env} line value=''
  if [[ -z ${!name:-} && -r $file ]]; then
    line=$(grep -E "^[[:space:]]*(export[[:space:]]+)?$name=" "$file" | tail -n 1) || true
    value=${line#*=} value=${value%$'\r'}
    if [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]]; then value=${BASH_REMATCH[1]}; else value=${value%%[[:space:]]*}; fi
  fi
  value=${!name:-${value:-$2}}
  printf -v "$name" %s "$value"
}

# Ends with 78 unless the variable $1 is one of the other arguments.
one_of() {
  local name=$1 word
  shift
  for word in "$@"; do
    if [[ ${!name} == "$word" ]]; then return; fi
  done
  fail "$name=${!name} is none of: $*" "set it to one of them, or unset it"
}

whole_number() { [[ ${!1} =~ ^[0-9]{1,9}$ ]] || fail "$1=${!1} is no whole number" "set it to one, or unset it"; }

# Reads all that is asked below, and says what is wrong with it before anything is started.
read_policy() {
  setting WMTP_RESTART auto
  setting WMTP_RESTART_LIMIT 10
  setting WMTP_RESTART_WINDOW 3600
  setting WMTP_WHEN_DONE nothing
  setting WMTP_WHEN_IDLE nothing
  setting WMTP_DOCTOR quick
  setting WMTP_WORKDIR ./work
  one_of WMTP_RESTART auto always never
  one_of WMTP_WHEN_DONE nothing stop destroy
  one_of WMTP_WHEN_IDLE nothing stop
  one_of WMTP_DOCTOR quick never
  whole_number WMTP_RESTART_LIMIT
  whole_number WMTP_RESTART_WINDOW
}

# Whether there is nothing to do after wmtp has ended: then start.sh can become it.
nothing_follows() { [[ $WMTP_RESTART == never && $WMTP_WHEN_DONE == nothing && $WMTP_WHEN_IDLE == nothing ]]; }

# --- before the first worker ---------------------------------------------------------------------------------

# Whether `wmtp doctor --quick` finds nothing that forbids to train here; prints what does. Looks at the options of
# `wmtp train` that it knows too. A machine that nobody rents is never refused: the worker may find a way there.
is_fit() {
  local wmtp=$1 options=() found fit=0
  shift
  while (($# > 0)); do
    case $1 in
    --recipe | --preset | --set) options+=("${@:1:2}") && shift ;;
    --recipe=* | --preset=* | --set=*) options+=("$1") ;;
    esac
    shift || break # an option that lacks its value
  done
  found=$(mktemp 2>/dev/null) || return 0
  trap interrupted HUP INT TERM
  # wrong settings are said by the worker, and only once
  interruptible "$wmtp" doctor --quick ${options[@]+"${options[@]}"} >"$found" 2>/dev/null || true
  trap - HUP INT TERM
  if grep '^fail' "$found" >&2 && ! grep -q '^pass  host  *bare' "$found"; then fit=1; fi
  rm -f "$found"
  return "$fit"
}

# --- starting again ------------------------------------------------------------------------------------------

# Whether a worker that ended with $1 is started again. 74 and 75 are errors.RESTARTED, a test holds them equal; the
# others are deaths that it could not help: out of memory, a crash below Python.
is_worth_a_restart() {
  case $1 in
  74 | 75) ;;
  132 | 134 | 135 | 136 | 137 | 139) ;;
  *) return 1 ;;
  esac
}

# Prints the seconds to wait before restart number $1.
pause_before() {
  local seconds=$SHORTEST_PAUSE number
  for ((number = 1; number < $1 && seconds < LONGEST_PAUSE; number++)); do seconds=$((seconds * 2)); done
  echo $((seconds < LONGEST_PAUSE ? seconds : LONGEST_PAUSE))
}

restarted=() # when, on $SECONDS' clock, within the window

# Whether there was no restart too many in the window that ends now; forgets those before it.
below_limit() {
  local when recent=()
  for when in ${restarted[@]+"${restarted[@]}"}; do
    if ((SECONDS - when < WMTP_RESTART_WINDOW)); then recent+=("$when"); fi
  done
  restarted=(${recent[@]+"${recent[@]}"})
  ((${#restarted[@]} < WMTP_RESTART_LIMIT))
}

stop_file() { echo "$WMTP_WORKDIR/STOP"; }

refuse_if_stopped() {
  if [[ -e $(stop_file) ]]; then fail "$(stop_file) is there, so nothing is started" "remove it to go on"; fi
}

worker=
told=0     # signals that came
hands_off= # somebody else decides what comes next
pass_on() {
  told=$((told + 1))
  if [[ -n $worker ]]; then kill -s "$1" "$worker" 2>/dev/null || true; fi
}

# Runs a command to its end and returns its exit code; each signal is passed on to it, once.
run_worker() {
  local before status
  if ((told > 0)); then return 75; fi
  # a process group of its own: a terminal's Ctrl-C and `tini -g` would reach it twice otherwise, which means: at once
  set -m
  "$@" </dev/null &
  worker=$!
  set +m
  if ((told > 0)); then pass_on TERM; fi # it came in between
  while :; do
    before=$told
    wait "$worker" && status=0 || status=$?
    if ((told == before)); then break; fi # else it was the signal that ended the waiting
  done
  worker=
  return "$status"
}

# Waits $1 seconds; a signal ends the waiting. By the second: one that comes just before `wait` does not end that.
wait_a_while() {
  local left=$1
  while ((left-- > 0 && told == 0)); do
    sleep 1 &
    wait $! || kill $! 2>/dev/null || true
  done
}

# Runs `wmtp train "$@"` until it is not to be started again here; returns its last exit code.
supervise() {
  local wmtp=$1 status
  shift
  trap 'pass_on HUP' HUP
  trap 'pass_on INT' INT
  trap 'pass_on TERM' TERM
  run_worker "$wmtp" train "$@" && status=0 || status=$?
  while is_to_go_on "$wmtp" "$status"; do
    restarted+=("$SECONDS")
    # the step or the new start that was asked for has been; from here on it is the newest checkpoint
    run_worker "$wmtp" train "$@" --resume auto && status=0 || status=$?
  done
  if [[ -z $hands_off ]] && ((told == 0)); then leave "$wmtp" "$status"; fi
  return "$status"
}

# Whether to start again after exit code $2: waits for the right moment, or says why not.
is_to_go_on() {
  local wmtp=$1 status=$2 pause
  if [[ $WMTP_RESTART == never ]] || ((told > 0)) || ! is_worth_a_restart "$status"; then return 1; fi
  if ! below_limit; then
    say "exit code $status; not started again: $WMTP_RESTART_LIMIT restarts in $WMTP_RESTART_WINDOW s (WMTP_RESTART_LIMIT)"
    return 1
  fi
  pause=$(pause_before $((${#restarted[@]} + 1)))
  say "exit code $status; starting again in $pause s (stop that: touch $(stop_file))"
  wait_a_while "$pause"
  if ((told > 0)); then return 1; fi
  if [[ -e $(stop_file) ]]; then
    say "not started again: $(stop_file) is there"
    hands_off=1
    return 1
  fi
  "$wmtp" host notices >&2 && status=0 || status=$?
  if [[ $status == 75 ]]; then
    say "not started again: this machine is about to be taken away; the same command goes on elsewhere"
    hands_off=1
    return 1
  fi
}

# --- afterwards ----------------------------------------------------------------------------------------------

# Whether a worker here holds a run (wmtp_worker/storage/runlock.py); returns $1 where that cannot be told.
is_used_here() {
  local lock found=
  command -v flock >/dev/null || return "$1"
  for lock in "$WMTP_WORKDIR"/checkpoints/*/.lock ${container_workdir:+"$container_workdir"/checkpoints/*/.lock}; do
    if [[ -e $lock ]]; then
      found=1
      flock --nonblock "$lock" true 2>/dev/null || return 0
    fi
  done
  if [[ -n $found ]]; then return 1; fi
  return "$1"
}

# Stops or destroys the machine, if that was asked for and exit code $2 allows it. A machine is only destroyed when all
# is done and safe. One whose run is trained elsewhere (79) idles; where that cannot be told, it is trained here.
leave() {
  local wmtp=$1 options=()
  case $2 in
  0)
    if [[ $WMTP_WHEN_DONE == nothing ]]; then return; fi
    if [[ $WMTP_WHEN_DONE == destroy ]]; then options=(--destroy); fi
    ;;
  *)
    if [[ $WMTP_WHEN_IDLE == nothing ]]; then return; fi
    if [[ $2 == 79 ]] && is_used_here 0; then return; fi
    ;;
  esac
  stop_machine "$wmtp" ${options[@]+"${options[@]}"}
}

# Asks the host to stop this machine, again and again while it cannot be reached: until a signal, or the file STOP. One on
# which another worker holds a run is left alone: its settings may be those of the whole container, and so ours too.
stop_machine() {
  local wmtp=$1 status
  shift
  while :; do
    if is_used_here 1; then
      say "this machine is not stopped: another worker trains on it"
      return
    fi
    "$wmtp" host stop "$@" >&2 && return || status=$?
    say "this machine is still there, and may cost money"
    if ((status != 75 || told > 0)); then return; fi
    say "asking again in $ASK_AGAIN s (stop that: touch $(stop_file))"
    wait_a_while "$ASK_AGAIN"
    if ((told > 0)) || [[ -e $(stop_file) ]]; then return; fi
  done
}
