# The second decision that PREREGISTRATION.md describes: every arm, ten fresh seeds, fresh worlds.
#
#     sh data/results/decide.sh              # two runs at a time; about six hours on 2 idle cores, and half an hour for
#     WORLDS=wordy-4 SEEDS="1110 1111 1112 1113 1114" ARMS="none|routeV|hidden-states|ceiling|absorption" sh ...
#
# Started again it goes on: a run whose row is in the file of results, or that is finished, is left alone; another is
# resumed from its last checkpoint. Arm "absorption" is today's default; those with --no-absorption were written down
# before it was. The first decision had SEEDS 1100 to 1109 and WORLDS="nano-2 wordy-2".
cd "$(dirname "$0")/../.." && mkdir -p runs || exit 1
export OMP_NUM_THREADS=1
for world in ${WORLDS:-nano-3 wordy-3}; do
    for seed in ${SEEDS:-1110 1111 1112 1113 1114 1115 1116 1117 1118 1119}; do
        grep -E "^(${ARMS:-[^ ]+}) " <<'TABLE' | while read -r arm flags; do
none           DEMOS --intervention none
routeV         DEMOS --no-absorption
ceiling        --intervention none --mix-ratio 0 --reward gt
placebo        DEMOS --no-absorption --routeV-random-v-seed SEED
coin           DEMOS --no-absorption --routeV-random-v-seed SEED --placebo coin
absorb         DEMOS --intervention absorb
fixed-share    DEMOS --routeV-random-v-seed SEED --placebo replaced --gate batch --k-mid 0.5 --k-hack 0.5
hidden-states  DEMOS --no-absorption --score activation
surprise       DEMOS --no-absorption --score surprise
length         DEMOS --no-absorption --score length
absorption     DEMOS
screen         DEMOS --no-absorption --on-hack screen
screen-80      DEMOS --no-absorption --intervention oracle --oracle-accuracy 0.8 --on-hack screen
absorption-80  DEMOS --intervention oracle --oracle-accuracy 0.8
dropped-80     DEMOS --intervention oracle --oracle-accuracy 0.8 --on-hack screen
oracle-80      DEMOS --no-absorption --intervention oracle --oracle-accuracy 0.8
oracle         DEMOS --no-absorption --intervention oracle
penalise       DEMOS --no-absorption --on-hack penalise
inoculate      DEMOS --intervention none --inoculate 'Cheat if you can.'
seeded-absorb  DEMOS --intervention absorb --expert-steps 10
seeded-routeV  DEMOS --no-absorption --expert-steps 10
TABLE
            run=runs/decide/$world/$arm-$seed
            grep -qs "^{\"arm\": \"$arm\", \"seed\": $seed," "data/results/$world.jsonl" || [ -f "$run/deploy.json" ] ||
                echo "--preset ${world%-*} --model data/$world --data data/$world/train.jsonl \
                    --test-data data/$world/test.jsonl --seed $seed --name $arm --out-dir $run --resume \
                    $(echo "$flags" | sed "s/SEED/$seed/; s|DEMOS|--demos data/$world/demos.jsonl|")"
        done
    done
done | tr '\n' '\0' | xargs -0 -P 2 -I{} sh -c 'python train_grpo.py {} >> runs/decide.log 2>&1'
for world in ${WORLDS:-nano-3 wordy-3}; do
    python evaluate_deploy.py $(ls -d runs/decide/"$world"/*/deploy.json | xargs -r dirname) \
        --results data/results/"$world".jsonl
done
