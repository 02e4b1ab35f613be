//! Processes in contention, and processes that die.

use dlock_tests::{
    Process, Server, dlock_child, on_every_network_server, on_every_server, unique_key, wait_for,
};

use crate::both::semaphore::looking;
use crate::support::*;

/// Starts a child, and waits until it is connected.
fn start(command: std::process::Command) -> (Process, i64) {
    let mut process = Process::spawn(command);
    let line = process.line();
    let id = line.strip_prefix("connected ").expect("its first line");
    let id = id.parse().expect("a number");
    (process, id)
}

/// Four processes add one to each of two counters; all for one counter use its key, if it has one.
fn count_in_processes(server: &Server, counters: [(&Table, Option<&str>); 2], rounds: u32) {
    let mut processes: Vec<Process> = Vec::new();
    for (table, key) in counters.into_iter().chain(counters) {
        let mut command = dlock_child![
            "--url",
            &server.url,
            "count",
            table.name(),
            "--rounds",
            rounds.to_string()
        ];
        if let Some(key) = key {
            command.args(["--key", key]);
        }
        processes.push(start(command).0);
    }
    for process in &mut processes {
        process.send("go on");
    }
    for process in &mut processes {
        process.expect_line("counted");
        assert!(process.wait().success());
    }
}

on_every_server! {
    fn four_processes_on_two_keys_lose_no_update<C: LockTest>(server: &Server) {
        const ROUNDS: u32 = 50;
        let keys = [unique_key("processes"), unique_key("processes")];
        let tables = [Table::counter(server), Table::counter(server)];
        count_in_processes(server, [(&tables[0], Some(&keys[0])), (&tables[1], Some(&keys[1]))], ROUNDS);
        let mut observer = C::open(server);
        for (key, table) in keys.iter().zip(&tables) {
            assert_eq!(table.value(&mut observer), i64::from(2 * ROUNDS));
            wait_until_free(&mut observer, key);
        }
    }

    /// What the test above would show if the lock did not work. In this order, always; in contention, nearly always.
    fn without_the_lock_updates_are_lost<C: LockTest>(server: &Server) {
        let table = Table::counter(server);
        let (mut a, mut b) = (C::open(server), C::open(server));
        let read = [table.value(&mut a), table.value(&mut b)];
        a.execute_sql(&format!("UPDATE {} SET n = {}", table.name(), read[0] + 1));
        b.execute_sql(&format!("UPDATE {} SET n = {}", table.name(), read[1] + 1));
        assert_eq!(table.value(&mut a), 1, "of two updates");

        const ROUNDS: u32 = 50;
        let tables = [Table::counter(server), Table::counter(server)];
        count_in_processes(server, [(&tables[0], None), (&tables[1], None)], ROUNDS);
        for table in &tables {
            let value = table.value(&mut a);
            println!("{value} of {} updates without the lock, on {server}", 2 * ROUNDS);
            assert!((1..=i64::from(2 * ROUNDS)).contains(&value));
        }
    }

    fn a_process_that_is_killed_hands_the_lock_to_the_one_that_waits<C: LockTest>(server: &Server) {
        let key = unique_key("process_sigkill");
        let mut observer = C::open(server);
        let (mut holder, holder_id) = start(dlock_child!["--url", &server.url, "hold", &key]);
        holder.expect_line("acquired");
        assert_held_by(&mut observer, &key, holder_id);
        let (mut waiter, waiter_id) = start(dlock_child!["--url", &server.url, "hold", &key]);
        wait_for("the waiter", || observer.is_waiting(waiter_id));
        holder.kill9();
        waiter.expect_line("acquired");
        assert_held_by(&mut observer, &key, waiter_id);
        waiter.send("go on");
        waiter.expect_line("released");
        assert_free(&mut observer, &key);
    }

    fn a_process_that_ends_without_releasing_hands_the_lock_to_the_one_that_waits<C: LockTest>(server: &Server) {
        let key = unique_key("process_exit");
        let mut observer = C::open(server);
        let (mut holder, holder_id) = start(dlock_child!["--url", &server.url, "exit", &key]);
        holder.expect_line("acquired");
        assert_held_by(&mut observer, &key, holder_id);
        let (mut waiter, waiter_id) = start(dlock_child!["--url", &server.url, "hold", &key]);
        wait_for("the waiter", || observer.is_waiting(waiter_id));
        holder.send("go on");
        assert!(holder.wait().success());
        waiter.expect_line("acquired");
        assert_held_by(&mut observer, &key, waiter_id);
        waiter.send("go on");
        waiter.expect_line("released");
        assert_free(&mut observer, &key);
    }

    /// A waiter that is gone is neither granted the lock for good nor in the way of those behind it.
    fn a_waiting_process_that_is_killed_leaves_the_queue<C: LockTest>(server: &Server) {
        let key = unique_key("process_waiter_killed");
        let mut observer = C::open(server);
        let (mut holder, _) = start(dlock_child!["--url", &server.url, "hold", &key]);
        holder.expect_line("acquired");
        let (mut killed, killed_id) = start(dlock_child!["--url", &server.url, "hold", &key]);
        wait_for("the waiter to be killed", || observer.is_waiting(killed_id));
        let (mut next, next_id) = start(dlock_child!["--url", &server.url, "hold", &key]);
        wait_for("the next waiter", || observer.is_waiting(next_id));
        killed.kill9();
        holder.send("go on");
        holder.expect_line("released");
        next.expect_line("acquired");
        assert_held_by(&mut observer, &key, next_id);
        next.send("go on");
        next.expect_line("released");
        wait_for("the end of the killed one's session", || !observer.is_connected(killed_id));
        assert_free(&mut observer, &key);
    }
}

on_every_network_server! {
    // SQLite has a queue in each process, and none between them.
    fn three_waiting_processes_are_served_in_the_order_in_which_they_came<C: LockTest>(server: &Server) {
        let key = unique_key("process_fifo");
        let mut observer = C::open(server);
        let (mut holder, _) = start(dlock_child!["--url", &server.url, "hold", &key]);
        holder.expect_line("acquired");
        let mut queue: Vec<(Process, i64)> = Vec::new();
        for _ in 0..3 {
            let (process, id) = start(dlock_child!["--url", &server.url, "hold", &key]);
            wait_for("the waiter", || observer.is_waiting(id));
            queue.push((process, id));
        }
        while !queue.is_empty() {
            holder.send("go on");
            holder.expect_line("released");
            let (mut first, id) = queue.remove(0);
            first.expect_line("acquired");
            assert_held_by(&mut observer, &key, id);
            for (_, behind) in &queue {
                assert!(observer.is_waiting(*behind));
            }
            holder = first;
        }
        holder.send("go on");
        holder.expect_line("released");
        assert_free(&mut observer, &key);
    }
}

/// When a worker was inside a semaphore.
struct Inside {
    worker: usize,
    slot: u32,
    from: u128,
    to: u128,
}

/// Processes with four workers each work at a semaphore, for 20 ms each time.
fn work_in_processes(server: &Server, key: &str, permits: u32, millis: u64) -> Vec<Inside> {
    let mut processes: Vec<Process> = (0..4)
        .map(|_| {
            let command = dlock_child![
                "--url",
                &server.url,
                "work",
                key,
                "--permits",
                permits.to_string(),
                "--workers",
                "4",
                "--work",
                "20",
                "--millis",
                millis.to_string()
            ];
            start(command).0
        })
        .collect();
    for process in &mut processes {
        process.expect_line("ready");
    }
    for process in &mut processes {
        process.send("go on");
    }
    let mut inside = Vec::new();
    for (number, process) in processes.iter_mut().enumerate() {
        loop {
            let line = process.line();
            if line == "done" {
                break;
            }
            let times = line.strip_prefix("inside ").expect("a time");
            let numbers: Vec<u128> = times
                .split(' ')
                .map(|number| number.parse().expect("a number"))
                .collect();
            inside.push(Inside {
                worker: 4 * number + numbers[0] as usize,
                slot: numbers[1] as u32,
                from: numbers[2],
                to: numbers[3],
            });
        }
        assert!(process.wait().success());
    }
    inside.sort_by_key(|inside| inside.from);
    inside
}

on_every_server! {
    fn sixteen_workers_of_four_processes_are_never_more_inside_than_permits<C: LockTest>(server: &Server) {
        const PERMITS: u32 = 3;
        let key = unique_key("processes_semaphore");
        let inside = work_in_processes(server, &key, PERMITS, 2_000);
        let mut times = [0; 16];
        for (index, one) in inside.iter().enumerate() {
            times[one.worker] += 1;
            let meanwhile = inside[..index].iter().filter(|other| other.to > one.from);
            let meanwhile: Vec<u32> = meanwhile.map(|other| other.slot).collect();
            assert!(meanwhile.len() < PERMITS as usize, "{} others are inside", meanwhile.len());
            assert!(!meanwhile.contains(&one.slot), "another one has slot {}", one.slot);
            assert!(one.slot < PERMITS);
        }
        assert!(times.iter().all(|times| *times > 0), "each has its turn: {times:?}");
        // The ends are left out, where not all of them work.
        let span = inside[inside.len() - 1].from - inside[0].from;
        let ideal = span as f64 / 20e6 * f64::from(PERMITS);
        println!(
            "{:.2} of the ideal throughput on {server}; each worker inside {times:?}",
            (inside.len() - 1) as f64 / ideal
        );
        let mut observer = C::open(server);
        for slot in 0..PERMITS {
            wait_until_free(&mut observer, dlock_core::LockKey::from(&key).semaphore_lock(Some(slot)));
        }
    }

    fn a_process_that_is_killed_frees_its_slot_and_the_gate<C: LockTest>(server: &Server) {
        let key = unique_key("process_semaphore_sigkill");
        let semaphore = dlock_core::LockKey::from(&key);
        let (slot, gate) = (semaphore.semaphore_lock(Some(0)), semaphore.semaphore_lock(None));
        let mut observer = C::open(server);
        let work = |millis: &str| {
            let (mut process, id) = start(dlock_child![
                "--url", &server.url, "work", &key, "--permits", "1", "--workers", "1", "--work", millis, "--millis", "0"
            ]);
            process.expect_line("ready");
            process.send("go on");
            (process, id)
        };
        let (mut holder, holder_id) = work("60000");
        wait_for("the holder", || holders(&mut observer, &slot) == [holder_id]);
        let (mut waiter, waiter_id) = work("0");
        wait_for("the waiter", || looking(&mut observer, &key) == [waiter_id]);
        let (mut next, next_id) = work("60000");
        wait_for("the next waiter", || observer.is_waiting(next_id));
        waiter.kill9();
        wait_for("the next waiter to look", || looking(&mut observer, &key) == [next_id]);
        holder.kill9();
        wait_for("the next waiter to be inside", || holders(&mut observer, &slot) == [next_id]);
        next.kill9();
        wait_until_free(&mut observer, &slot);
        assert_free(&mut observer, &gate);
    }
}

on_every_network_server! {
    /// On SQLite the process itself looks, so there it does.
    fn a_waiting_process_that_is_stopped_does_not_keep_others_out<C: LockTest>(server: &Server) {
        let key = unique_key("process_semaphore_stopped");
        let semaphore = dlock_core::LockKey::from(&key);
        let slots = [0, 1].map(|slot| semaphore.semaphore_lock(Some(slot)));
        let gate = semaphore.semaphore_lock(None);
        let mut observer = C::open(server);
        assert!(slots.iter().all(|slot| try_lock(&mut observer, slot)));
        let (mut stopped, stopped_id) = start(dlock_child![
            "--url", &server.url, "work", &key, "--permits", "2", "--workers", "1", "--work", "0", "--millis", "0"
        ]);
        stopped.expect_line("ready");
        stopped.send("go on");
        wait_for("the waiter", || looking(&mut observer, &key) == [stopped_id]);
        let signal = |name: &str, process: &Process| {
            let id = process.id().to_string();
            let sent = std::process::Command::new("kill").args([name, &id]).status();
            assert!(sent.expect("kill runs").success());
        };
        signal("-STOP", &stopped);
        // The session takes it for a process that does not go on.
        unlock(&mut observer, &slots[0]);
        let (mut next, _) = start(dlock_child![
            "--url", &server.url, "work", &key, "--permits", "2", "--workers", "1", "--work", "0", "--millis", "0"
        ]);
        next.expect_line("ready");
        next.send("go on");
        unlock(&mut observer, &slots[1]);
        assert!(next.line().starts_with("inside "));
        next.expect_line("done");
        signal("-CONT", &stopped);
        assert!(stopped.line().starts_with("inside "));
        for lock in slots.iter().chain([&gate]) {
            wait_until_free(&mut observer, lock);
        }
    }
}
