//! Processes in contention, and processes that die.

use dlock_tests::{
    Process, Server, dlock_child, on_every_network_server, on_every_server, unique_key, wait_for,
};

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
