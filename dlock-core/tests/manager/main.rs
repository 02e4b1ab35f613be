//! The manager against a model of the servers, driven by a seeded scheduler. `DLOCK_SEED=n` runs one seed again.

mod cases;
mod random;
mod server;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use random::Random;
use world::{MILLI, Plan, SECOND, World};

/// Any plan.
fn plan(seed: u64) -> Plan {
    let mut random = Random(seed ^ 0x5eed);
    let faults = random.range(0, 4);
    let mut sometimes = |often: u64| match random.one_in(2) {
        true => random.range(often / 4, 2 * often),
        false => 0,
    };
    let (broken, silent, killed) = match faults {
        0 => (0, 0, 0),
        _ => (sometimes(200), sometimes(400), sometimes(200)),
    };
    let (refused, dropped, limited) = (sometimes(10), sometimes(8), sometimes(4));
    Plan {
        processes: random.range(1, 4) as usize,
        connections: random.range(1, 5) as usize,
        tasks: random.range(1, 9) as usize,
        first_key: 0,
        keys: random.range(1, 6),
        rounds: 30,
        lease: random.range(2, 6) * SECOND,
        longest_wait: random.one_in(2).then_some(2 * SECOND),
        turns: [2, 8, 64][random.range(0, 3) as usize],
        permits: [0, 1, 2, 5][random.range(0, 4) as usize],
        several: [0, 2, 6][random.range(0, 3) as usize],
        exclusive: random.one_in(2),
        work: [MILLI, 10 * MILLI, 60 * MILLI][random.range(0, 3) as usize],
        long: 40,
        slow: 50,
        broken,
        silent,
        killed,
        refused,
        dropped,
        limited,
        closed_at: None,
    }
}

fn seeds(default: std::ops::Range<u64>) -> std::ops::Range<u64> {
    match std::env::var("DLOCK_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
    {
        Some(seed) => seed..seed + 1,
        None => default,
    }
}

/// What has happened in all runs.
#[derive(Debug, Default)]
struct Sum {
    steps: u64,
    grants: u64,
    losses: u64,
    drawn: u64,
    told: u64,
}

fn each_seed(seeds: std::ops::Range<u64>, mut run: impl FnMut(u64) -> World) -> Sum {
    let mut sum = Sum::default();
    for seed in seeds {
        let world = catch_unwind(AssertUnwindSafe(|| run(seed)));
        let world = world.unwrap_or_else(|_| panic!("seed {seed} fails: DLOCK_SEED={seed}"));
        sum.steps += world.steps;
        sum.grants += world.grants;
        sum.losses += world.losses;
        sum.drawn += world.drawn;
        sum.told += world.told;
    }
    eprintln!("{sum:?}");
    sum
}

#[test]
fn whatever_happens_two_never_believe_that_they_hold_and_nobody_is_forgotten() {
    let sum = each_seed(seeds(0..1_000), |seed| {
        let mut world = World::new(seed, plan(seed));
        world.run(u64::MAX);
        world
    });
    if std::env::var_os("DLOCK_SEED").is_none() {
        assert!(sum.steps > 1_000_000 && sum.grants > 100_000 && sum.losses > 300);
        assert!(sum.drawn > 10_000 && sum.told > 1_000);
    }
}

#[test]
fn a_manager_that_is_closed_leaves_nothing_and_tells_everybody() {
    each_seed(seeds(0..300), |seed| {
        let mut plan = plan(seed);
        plan.closed_at = Some(Random(seed).range(0, 3 * SECOND));
        let mut world = World::new(seed, plan);
        world.run(u64::MAX);
        assert!(world.all_closed());
        world
    });
}

#[test]
fn two_processes_share_a_lock_fairly() {
    let fair = Plan {
        processes: 2,
        tasks: 32,
        rounds: u32::MAX,
        ..QUIET
    };
    for seed in seeds(0..10) {
        for longest_wait in [None, Some(2 * SECOND)] {
            let plan = Plan {
                longest_wait,
                ..fair.clone()
            };
            let mut world = World::new(seed, plan);
            world.run(10 * SECOND);
            let turns = world.turns();
            let share = turns[0] as f64 / (turns[0] + turns[1]) as f64;
            assert!((0.4..0.6).contains(&share), "seed {seed}: {turns:?}");
            // Each process has at most 64 turns of a millisecond before the other, and 32 tasks wait.
            assert!(
                world.longest_wait < SECOND,
                "seed {seed}: {}",
                world.longest_wait
            );
        }
    }
}

const QUIET: Plan = Plan {
    processes: 1,
    connections: 4,
    tasks: 1,
    first_key: 0,
    keys: 1,
    rounds: 1,
    lease: 30 * SECOND,
    longest_wait: None,
    turns: 64,
    permits: 0,
    several: 0,
    exclusive: true,
    work: MILLI,
    long: 0,
    slow: 0,
    broken: 0,
    silent: 0,
    killed: 0,
    refused: 0,
    dropped: 0,
    limited: 0,
    closed_at: None,
};

#[test]
fn two_processes_share_a_semaphore_fairly_and_use_all_its_slots() {
    let fair = Plan {
        processes: 2,
        tasks: 32,
        rounds: u32::MAX,
        first_key: 1,
        permits: 3,
        ..QUIET
    };
    for seed in seeds(0..3) {
        for longest_wait in [None, Some(2 * SECOND)] {
            let plan = Plan {
                longest_wait,
                ..fair.clone()
            };
            let mut world = World::new(seed, plan);
            world.run(10 * SECOND);
            let turns = world.turns();
            let share = turns[0] as f64 / (turns[0] + turns[1]) as f64;
            assert!((0.35..0.65).contains(&share), "seed {seed}: {turns:?}");
            assert!(
                world.longest_wait < SECOND,
                "seed {seed}: {}",
                world.longest_wait
            );
            assert!(world.most_inside == 3, "seed {seed}: {}", world.most_inside);
        }
    }
}

#[test]
fn a_thousand_slots_need_two_connections() {
    let plan = Plan {
        connections: 2,
        tasks: 1000,
        first_key: 1,
        permits: 1000,
        work: 600 * SECOND,
        ..QUIET
    };
    let mut world = World::new(1, plan);
    world.run(40 * SECOND);
    assert!(world.grants >= 900, "{}", world.grants);
    assert!(world.most_connections <= 2);
}

#[test]
fn a_thousand_tasks_wait_for_one_lock_over_one_waiting_connection() {
    let plan = Plan {
        processes: 2,
        tasks: 1000,
        ..QUIET
    };
    let mut world = World::new(1, plan);
    world.run(u64::MAX);
    assert_eq!(world.grants, 2000);
    assert!(world.most_connections <= 2, "{}", world.most_connections);
}

#[test]
fn a_thousand_tasks_wait_for_a_thousand_taken_locks_over_four_connections() {
    let plan = Plan {
        processes: 2,
        tasks: 1000,
        keys: 1000,
        rounds: 2,
        work: 5 * SECOND,
        ..QUIET
    };
    let mut world = World::new(1, plan);
    world.run(u64::MAX);
    assert_eq!(world.grants, 4000);
}

#[test]
fn ten_thousand_locks_are_held_over_two_connections() {
    let plan = Plan {
        connections: 2,
        tasks: 10_000,
        keys: u64::MAX >> 1,
        work: 600 * SECOND,
        ..QUIET
    };
    let mut world = World::new(1, plan);
    world.run(40 * SECOND);
    assert_eq!(world.grants, 10_000);
    assert!(world.most_connections <= 2);
}
