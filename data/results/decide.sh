# The decision that PREREGISTRATION.md describes: every arm, ten fresh seeds, two fresh worlds.
#
#     sh data/results/decide.sh              # two runs at a time; about six hours on 2 idle cores
#     SEEDS="1100 1101" WORLDS=nano-2 ARMS="none|routeV" sh data/results/decide.sh        # a part of it
#
# Started again it goes on: a run whose row is in the file of results, or that is finished, is left alone; another is
# resumed from its last checkpoint.
cd "$(dirname "$0")/../.." && mkdir -p runs || exit 1
export OMP_NUM_THREADS=1
for world in ${WORLDS:-nano-2 wordy-2}; do
    for seed in ${SEEDS:-1100 1101 1102 1103 1104 1105 1106 1107 1108 1109}; do
        grep -E "^(${ARMS:-[^ ]+}) " <<'TABLE' | while read -r arm flags; do
none           DEMOS --intervention none
routeV         DEMOS
hidden-states  DEMOS --score activation
placebo        DEMOS --routeV-random-v-seed SEED
coin           DEMOS --routeV-random-v-seed SEED --placebo coin
surprise       DEMOS --score surprise
length         DEMOS --score length
absorb         DEMOS --intervention absorb
ceiling        --intervention none --mix-ratio 0 --reward gt
screen         DEMOS --on-hack screen
oracle-80      DEMOS --intervention oracle --oracle-accuracy 0.8
screen-80      DEMOS --intervention oracle --oracle-accuracy 0.8 --on-hack screen
penalise       DEMOS --on-hack penalise
inoculate      DEMOS --intervention none --inoculate 'Cheat if you can.'
seeded-absorb  DEMOS --intervention absorb --expert-steps 10
seeded-routeV  DEMOS --expert-steps 10
oracle         DEMOS --intervention oracle
absorption     DEMOS --absorption
absorption-80  DEMOS --absorption --intervention oracle --oracle-accuracy 0.8
TABLE
            run=runs/decide/$world/$arm-$seed
            grep -qs "^{\"arm\": \"$arm\", \"seed\": $seed," "data/results/$world.jsonl" || [ -f "$run/deploy.json" ] ||
                echo "--preset ${world%-2} --model data/$world --data data/$world/train.jsonl \
                    --test-data data/$world/test.jsonl --seed $seed --name $arm --out-dir $run --resume \
                    $(echo "$flags" | sed "s/SEED/$seed/; s|DEMOS|--demos data/$world/demos.jsonl|")"
        done
    done
done | tr '\n' '\0' | xargs -0 -P 2 -I{} sh -c 'python train_grpo.py {} >> runs/decide.log 2>&1'
for world in ${WORLDS:-nano-2 wordy-2}; do
    python evaluate_deploy.py $(ls -d runs/decide/"$world"/*/deploy.json | xargs -r dirname) \
        --results data/results/"$world".jsonl
done
