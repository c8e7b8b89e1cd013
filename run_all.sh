#!/usr/bin/env bash
# Makes every run behind every figure and table, then the figures and tables themselves. ./run_all.sh --help says how.
set -eo pipefail
cd "$(dirname "$0")"

# bash reads what is between these braces before it begins, so this file may change while it runs for days.
{
# The grid of one seed, in the order in which it is made. dst_td3.py makes a row, or dst_sac.py where its method is one of
# SAC's, or high_sparsity.py where the row names it. A row only says what differs from its program's defaults, in any
# options of that; those of the first two are the paper's settings. N% of --snapshot-at and --initial-policy stands for
# the policy after N % of a run, the paper's 5e5 and 7e5 steps; --initial-policy takes that of the run that is otherwise
# the same. Several environments stand between commas.
four=HalfCheetah-v4,Walker2d-v4,Hopper-v4,Ant-v4
# shown in                      environment     method      program where it is another, further arguments
grid="
fig1,tables,fig2,fig4,fig5      HalfCheetah-v4  ds-td3      --snapshot-at 50% 70%
fig1,tables,fig2,fig3,fig4,fig5 HalfCheetah-v4  td3         --snapshot-at 50% 70%
fig1,tables                     HalfCheetah-v4  static-td3
fig1,tables,fig5                Hopper-v4       ds-td3
fig1,tables,fig5                Hopper-v4       td3
fig1,tables                     Hopper-v4       static-td3
fig1,tables,fig5                Walker2d-v4     ds-td3
fig1,tables,fig5                Walker2d-v4     td3
fig1,tables                     Walker2d-v4     static-td3
fig1,tables,fig5                Ant-v4          ds-td3
fig1,tables,fig5                Ant-v4          td3
fig1,tables                     Ant-v4          static-td3
fig1,tables                     Humanoid-v4     ds-td3
fig1,tables                     Humanoid-v4     td3
fig1,tables                     Humanoid-v4     static-td3
fig2                            HalfCheetah-v4  ds-td3      --adapt-interval 200
fig2                            HalfCheetah-v4  ds-td3      --adapt-interval 500
fig2                            HalfCheetah-v4  ds-td3      --adapt-interval 2000
fig3                            HalfCheetah-v4  ds-td3      --sparsity 0.25
fig3                            HalfCheetah-v4  ds-td3      --sparsity 0.5
fig3                            HalfCheetah-v4  ds-td3      --sparsity 0.8
fig4                            HalfCheetah-v4  ds-td3      --initial-policy 50%
fig4                            HalfCheetah-v4  ds-td3      --initial-policy 70%
fig4                            HalfCheetah-v4  td3         --initial-policy 50%
fig4                            HalfCheetah-v4  td3         --initial-policy 70%
fig5                            $four           ds-td3      high_sparsity.py --sparsity 0.9
fig5                            $four           ds-td3      high_sparsity.py --sparsity 0.95
fig5                            $four           ds-td3      high_sparsity.py --sparsity 0.9 --drop-by magnitude
fig5                            $four           static-td3  high_sparsity.py --sparsity 0.9
fig5                            $four           ds-td3      --sparsity 0.9
fig5                            $four           ds-td3      --sparsity 0.95
fig5                            HalfCheetah-v4,Walker2d-v4 td3         high_sparsity.py
fig5                            HalfCheetah-v4  td3         high_sparsity.py --hidden 77 77
appendix                        HalfCheetah-v4  ds-sac
appendix                        HalfCheetah-v4  sac
appendix                        Hopper-v4       ds-sac
appendix                        Hopper-v4       sac
appendix                        Walker2d-v4     ds-sac
appendix                        Walker2d-v4     sac
appendix                        Ant-v4          ds-sac
appendix                        Ant-v4          sac
appendix                        Humanoid-v4     ds-sac
appendix                        Humanoid-v4     sac
"

usage() {
  cat <<'END'
usage: ./run_all.sh [OPTION ...]

Trains every agent of the paper and executes analysis.ipynb, which makes every figure and table from the results.
It can be stopped at any moment; given again, it does only what is missing.

  --only NAME              only the runs of fig1, fig2, fig3, fig4, tables (1 and 2), fig5 (sparsity 0.9 and 0.95),
                           appendix (tables 3 to 5: DS-SAC), an environment or a method; given again, it narrows
                           further: --only fig1 --only Hopper-v4
  --seeds N                seeds of each run, 0 to N-1 (default: 5; with --quick: 2)
  --steps N                environment steps of a run (default: 1000000; with --quick: 1500)
  --jobs N                 runs at the same time, one thread each (default: one for each core)
  --quick                  the whole pipeline with tiny runs, to see that it works; results in RESULTS/quick
  --results-dir RESULTS    where results go, seen from the folder of this script (default: results)
  --list                   print the command of each run, one a line, and the time that all would take; run nothing
  --line N                 run only line N of the list, for job schedulers other than Slurm
  --slurm                  submit what is missing as a Slurm job array instead of running it here
  --slurm-options OPTIONS  what else sbatch is given: --slurm-options "--time=24:00:00 --partition=cpu"
  --help                   print this
END
}

reject() {
  echo "run_all.sh: error: $1" >&2
  exit 2
}

original_arguments=$*
only=() seeds='' steps='' jobs='' quick='' folder=results list='' line='' slurm='' slurm_options=''
while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    --only | --seeds | --steps | --jobs | --results-dir | --line | --slurm-options)
      [[ -n $2 && ($1 == --slurm-options || $2 != --*) ]] || reject "$1 needs a value (--help lists the options)" ;;
  esac
  case $1 in
    --only) only+=("$2"); shift ;;
    --seeds) seeds=$2; shift ;;
    --steps) steps=$2; shift ;;
    --jobs) jobs=$2; shift ;;
    --quick) quick=yes ;;
    --results-dir) folder=$2; shift ;;
    --list) list=yes ;;
    --line) line=$2; shift ;;
    --slurm) slurm=yes ;;
    --slurm-options) slurm_options=$2; shift ;;
    --help | -h) usage; exit ;;
    *) reject "there is no option $1 (--help lists them)" ;;
  esac
  shift
done
results=$folder${quick:+/quick}
: "${seeds:=${quick:+2}}" "${steps:=${quick:+1500}}"
: "${seeds:=5}" "${steps:=1000000}" "${jobs:=$(nproc)}"
for option in seeds steps jobs line; do
  [[ ${!option} =~ ^([1-9][0-9]{0,8})?$ ]] ||
    reject "--$option must be a positive whole number, not ${!option} (at most 999999999)"
done
least_steps=${quick:+10}
((steps >= ${least_steps:=25001})) || reject "--steps must be at least $least_steps, not $steps: learning has to start"
[[ $folder != *[[:space:]]* ]] || reject "--results-dir must be a path without spaces, not $folder"

# ---------------------------------------------------------------------------------------------------------------------
# The list of runs: for each its command, its directory, and the file it needs from another run, if any
# ---------------------------------------------------------------------------------------------------------------------

rows=''
while read -r figures environments method further; do
  for env in ${environments//,/ }; do
    for name in "${only[@]}"; do
      [[ ,$figures,$env,$method, == *,$name,* ]] || continue 2
    done
    rows+="$env $method $further"$'\n'
  done
done <<<"$grid"
[[ -n $rows ]] ||
  reject "no run matches --only ${only[*]}: it takes fig1 to fig5, tables, appendix, an environment or a method"

length='' evaluation=''
((steps == 1000000)) || length="--total-timesteps $steps"
if [[ -n $quick ]]; then
  length+=" --learning-starts $((steps / 4))"
  evaluation="--eval-interval $((steps / 10)) --eval-episodes 1"
fi

# What `make` sets up serves unless another environment is active.
[[ -n $VIRTUAL_ENV || ! -x .venv/bin/python ]] || PATH=$PWD/.venv/bin:$PATH
command -v python >/dev/null || reject "there is no python on the PATH: activate the environment of requirements.txt"

# Prints a line for each run, its three parts between tabs. Its program's arguments name the directory.
list_runs() {
  python - "$rows" "$seeds" "$steps" "$length" "$evaluation" "$results" <<'END'
import dataclasses
import itertools
import re
import sys
from pathlib import Path

try:
    import tyro

    from dst_sac import SACArguments
    from dst_td3 import Arguments, resolve, run_directory
    from high_sparsity import HighSparsityArguments
except ImportError as error:
    print(f"run_all.sh: error: {error}: activate the environment of requirements.txt", file=sys.stderr)
    sys.exit(2)

rows, seeds, steps, length, evaluation, results = sys.argv[1:]
programs = {"dst_td3.py": Arguments, "dst_sac.py": SACArguments, "high_sparsity.py": HighSparsityArguments}


def directory(args):
    return f"{results}/{run_directory(resolve(args))}"


# Seeds in the outer loop: every environment and method has one seed before any has two.
for seed, row in itertools.product(range(int(seeds)), rows.splitlines()):
    row = re.sub(r"(\d+)%", lambda percent: str(int(steps) * int(percent[1]) // 100), row)
    agent, *further = re.split(r"\s+(?=--)", row.strip())
    env, method, *named = agent.split()
    options = {option.split()[0]: option for option in further}
    initial, snapshots = (options.pop(name, "") for name in ("--initial-policy", "--snapshot-at"))
    setting = f"--env {env} --method {method} --seed {seed} {' '.join(options.values())} {length}"
    program = named[0] if named else "dst_sac.py" if method.endswith("sac") else "dst_td3.py"
    args = tyro.cli(programs[program], args=f"{setting} {evaluation} --results-dir .".split(), prog=program)
    need = ""
    if initial:
        need = f"{directory(args)}/policy-{initial.split()[1]}.npz"
        initial = f"--initial-policy {need}"
        args = dataclasses.replace(args, initial_policy=Path(need))
    words = f"{setting} {initial} {evaluation} {snapshots} --results-dir {results}".split()
    print(" ".join(["python", program, *words]), directory(args), need, sep="\t")
END
}

listing=$(list_runs)
commands=() directories=() needs=()
while IFS=$'\t' read -r command directory need; do
  commands+=("$command")
  directories+=("$directory")
  needs+=("$need")
done <<<"$listing"
total=${#commands[@]}

is_finished() { [[ -f ${directories[$1]}/summary.json ]]; }
is_ready() { [[ -z ${needs[$1]} || -f ${needs[$1]} ]]; }

missing=()
for run in "${!commands[@]}"; do is_finished "$run" || missing+=("$run"); done

# ---------------------------------------------------------------------------------------------------------------------
# --list, --line and --slurm
# ---------------------------------------------------------------------------------------------------------------------

if [[ -n $list ]]; then
  printf '%s\n' "${commands[@]}"
  echo "$total runs of $steps steps, ${#missing[@]} of them not finished" >&2
  # Both times of a summary together are what a run costs. Finished runs of the same setting tell what a run will cost;
  # where there are none, all finished runs of its algorithm do.
  {
    for run in "${!commands[@]}"; do
      if is_finished "$run"; then echo "finished ${directories[run]}/"; else echo "missing ${directories[run]}/"; fi
    done
    find "$results" -mindepth 4 -maxdepth 4 -name summary.json -exec grep -H : {} + 2>/dev/null || true
  } | tr -d '",' |
    awk -v steps="$steps" '
      function algorithm_of(setting) { return setting ~ "/[a-z-]*sac(_[^/]*)?$" ? "SAC" : "TD3" }
      {
        listed = $1 == "finished" || $1 == "missing"
        setting = listed ? $2 : $1
        sub("/seed[0-9]+/.*", "", setting)
        gsub("/+", "/", setting)
        algorithm = algorithm_of(setting)
      }
      listed { total[algorithm]++; runs[setting]++ }
      $1 == "missing" { missing[algorithm]++; left[setting]++ }
      $2 == "steps:" { made[setting] += $3; made[algorithm] += $3; finished[algorithm]++ }
      $2 == "training_seconds:" || $2 == "evaluation_seconds:" { seconds[setting] += $3; seconds[algorithm] += $3 }
      END {
        for (setting in runs) {
          algorithm = algorithm_of(setting)
          known = made[setting] ? setting : algorithm
          hours = made[known] ? steps * seconds[known] / made[known] / 3600 : 0
          all[algorithm] += hours * runs[setting]
          ahead[algorithm] += hours * left[setting]
        }
        for (algorithm in total) {
          printf "%s: ", algorithm
          if (!made[algorithm]) { print "no run is finished yet: the time of the others is unknown"; continue }
          printf "about %.1f core-hours for all %d, ", all[algorithm], total[algorithm]
          printf "%.1f for the %d missing ones ", ahead[algorithm], missing[algorithm]
          printf "(by %d finished runs, each setting by its own where it has some)\n", finished[algorithm]
        }
      }' >&2
  exit
fi

if [[ -n $line ]]; then
  ((line <= total)) || reject "--line must be at most $total, the length of the list, not $line"
  echo "${commands[line - 1]}"
  # shellcheck disable=SC2086 # a command of the list is made of words without spaces
  exec ${commands[line - 1]}
fi

logs=$results/logs
mkdir -p "$logs" 2>/dev/null || reject "cannot write to $results: choose another --results-dir"

submit() {
  local tasks=$1
  shift
  # shellcheck disable=SC2086 # the options are words by design
  sbatch --parsable --job-name=dst-td3 --array="$tasks" --cpus-per-task=1 --requeue --open-mode=append \
    --output="$logs/slurm-%A_%a.log" "$@" $slurm_options --wrap "exec ./run_all.sh $list_options \
--line \$SLURM_ARRAY_TASK_ID"
}

if [[ -n $slurm ]]; then
  command -v sbatch >/dev/null || reject "--slurm needs sbatch, which this machine does not have"
  list_options="--seeds $seeds --steps $steps --results-dir $folder${quick:+ --quick}"
  for name in "${only[@]}"; do list_options+=" --only $name"; done
  now='' later=''
  for run in "${missing[@]}"; do
    if is_ready "$run"; then now+=,$((run + 1)); else later+=,$((run + 1)); fi
  done
  first=''
  if [[ -n $now ]]; then
    first=$(submit "${now#,}")
    echo "submitted job array $first, one task for each line of ./run_all.sh --list: ${now#,}"
  fi
  if [[ -n $later ]]; then
    # Figure 4 begins with policies of other runs, so Slurm holds it back until those have ended.
    second=$(submit "${later#,}" ${first:+"--dependency=afterany:$first"})
    echo "submitted job array $second, which waits for the policies that Figure 4 begins with: ${later#,}"
  fi
  echo "logs are in $logs; when all are done, the same command without --slurm makes the figures and tables"
  exit
fi

# ---------------------------------------------------------------------------------------------------------------------
# Runs on this machine
# ---------------------------------------------------------------------------------------------------------------------

pids=() failures=() finished=0 steps_before=0 last_shown=''
done_before=$((total - ${#missing[@]}))

log_of() {
  local name=${directories[$1]#"$results"/}
  echo "$logs/${name//\//_}.log"
}

# The step of a run's last evaluation.
step_of() {
  local step
  step=$(tail -n 1 "${directories[$1]}/evaluations.csv" 2>/dev/null | cut -d, -f1)
  [[ $step =~ ^[0-9]+$ ]] || step=0
  echo "$step"
}

start() {
  # Steps of an earlier session would make this one look faster than it is.
  steps_before=$((steps_before + $(step_of "$1")))
  echo "${commands[$1]}" >>"$(log_of "$1")"
  # shellcheck disable=SC2086 # a command of the list is made of words without spaces
  ${commands[$1]} >>"$(log_of "$1")" 2>&1 </dev/null &
  pids[$1]=$!
}

# Takes note of the runs that have ended since the last time.
reap() {
  local run alive
  alive=" $(jobs -rp | tr '\n' ' ')"
  for run in "${!pids[@]}"; do
    [[ $alive != *" ${pids[run]} "* ]] || continue
    if wait "${pids[run]}" && is_finished "$run"; then
      finished=$((finished + 1))
    else
      failures+=("$run")
    fi
    unset "pids[run]"
  done
}

show_progress() {
  local counts left='' made=$((finished * steps - steps_before)) run
  counts="$((done_before + finished)) done, ${#pids[@]} running, ${#failures[@]} failed of $total runs"
  # A log file needs a line only when something has changed.
  if [[ ! -t 1 && $counts == "$last_shown" ]]; then return; fi
  last_shown=$counts
  for run in "${!pids[@]}"; do made=$((made + $(step_of "$run"))); done
  if ((made > 0)); then
    left=$(((SECONDS - started) * ((${#missing[@]} - ${#failures[@]}) * steps - steps_before - made) / made / 60))
    left=", about $((left / 60)) h $((left % 60)) min left"
  fi
  if [[ -t 1 ]]; then printf '\r\033[K%s%s' "$counts" "$left"; else echo "$(date '+%F %T')  $counts$left"; fi
}

# Each run writes a checkpoint when it is told to stop.
# shellcheck disable=SC2329 # the traps below call it
stop() {
  trap '' INT TERM
  echo
  echo "stopping: each run first writes its checkpoint"
  ((${#pids[@]} == 0)) || kill -TERM "${pids[@]}" 2>/dev/null || true
  wait
  echo "stopped with $((done_before + finished)) of $total runs done; to go on: ./run_all.sh $original_arguments"
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

started=$SECONDS
waiting=("${missing[@]}")
while ((${#waiting[@]} + ${#pids[@]})); do
  reap
  for place in "${!waiting[@]}"; do
    ((${#pids[@]} < jobs)) || break
    if is_ready "${waiting[place]}"; then
      start "${waiting[place]}"
      unset "waiting[place]"
    fi
  done
  if ((${#pids[@]} == 0)); then
    # Nothing runs and nothing can start: the runs that these depend on have failed or kept no policy.
    for run in "${waiting[@]}"; do
      echo "${directories[run]} needs ${needs[run]}, which the run in that folder did not leave: move the folder away" \
        "to make it again" >>"$(log_of "$run")"
      failures+=("$run")
    done
    waiting=()
  fi
  show_progress
  sleep 1
done
[[ ! -t 1 ]] || echo

# ---------------------------------------------------------------------------------------------------------------------
# Speed measurements, figures and tables
# ---------------------------------------------------------------------------------------------------------------------

# Seconds mean something only once no run takes cores away. Other libraries are compared where `make benchmark` has set
# up their environment.
peers=.venv-peers/bin/python
benchmark=(python benchmarks/benchmark.py --results-dir "$results/benchmarks")
last_file=README.md
if [[ -n $quick ]]; then
  benchmark+=(--only updates --repeats 1)
  last_file=updates.csv
elif [[ -x $peers ]]; then
  benchmark+=(--peers "$peers")
fi
if [[ -d benchmarks && ${#only[@]} == 0 && ! -f $results/benchmarks/$last_file ]]; then
  echo "measuring speed and memory: ${benchmark[*]}"
  "${benchmark[@]}" >"$logs/benchmark.log" 2>&1 || failures+=(benchmark)
fi

echo "executing analysis.ipynb: $results/analysis.ipynb, $results/figures and $results/tables"
RESULTS_DIR=$results jupyter execute analysis.ipynb --output="$results/analysis" >"$logs/analysis.log" 2>&1 ||
  failures+=(analysis)

((${#failures[@]} > 0)) || exit 0
echo "${#failures[@]} failed; the same command tries them again. Their logs, with the last line of each:" >&2
for run in "${failures[@]}"; do
  case $run in
    benchmark | analysis) log=$logs/$run.log ;;
    *) log=$(log_of "$run") ;;
  esac
  echo "  $log: $(tail -n 1 "$log")" >&2
done
exit 1
}
