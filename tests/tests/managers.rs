//! Managers in processes of their own: one that is stopped, and what a manager leaves behind.

use std::env;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use diesel::{MysqlConnection, PgConnection};
use dlock_diesel::{AdvisoryLockExt, Error, LockConnection, LockManager};
use dlock_tests::{
    PATIENCE, Process, Proxy, Server, TestConnection, on_every_network_server, on_postgres,
    start_transaction_pooler, unique_key, wait_for,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The tests count threads.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

trait Lockable: TestConnection + LockConnection {}

impl Lockable for PgConnection {}
impl Lockable for MysqlConnection {}

fn threads_of_managers() -> usize {
    let threads = fs::read_dir("/proc/self/task").expect("the threads");
    let names =
        threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("dlock-")).count()
}

fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a date")
}

on_every_network_server! {
    fn a_manager_leaves_no_thread<C: Lockable>(server: &Server) {
        let _alone = alone();
        let locks = LockManager::<C>::at(&server.url).build();
        let (key, taken) = (unique_key("threads"), unique_key("taken"));
        let mut other = C::open(server);
        let _theirs = other.advisory_lock(&taken).acquire().expect("a free lock");
        let held = locks.lock(&key).acquire().expect("a free lock");
        let waits = thread::spawn({
            let locks = locks.clone();
            move || locks.lock(&taken).acquire().map(drop)
        });
        wait_for("a thread for the time and two connections", || threads_of_managers() == 3);
        locks.close();
        assert!(waits.join().expect("no panic").is_err());
        wait_for("no thread", || threads_of_managers() == 0);
        drop(held);

        let locks = LockManager::<C>::at(&server.url).build();
        let held = locks.lock(&key).acquire().expect("a free lock");
        drop(locks);
        wait_for("no thread", || threads_of_managers() == 0);
        drop(held);
    }

    fn a_callback_is_called_once_when_the_lock_is_lost_and_never_after_a_release<C: Lockable>(server: &Server) {
        let _alone = alone();
        let proxy = Proxy::start(server);
        let locks = LockManager::<C>::at(proxy.url()).build();
        let calls = [0; 3].map(|_| Arc::new(AtomicU64::new(0)));
        let count = |calls: &Arc<AtomicU64>| {
            let calls = Arc::clone(calls);
            move || {
                calls.fetch_add(1, Ordering::SeqCst);
            }
        };
        let released = locks.lock(unique_key("callback")).acquire().expect("a free lock");
        released.on_lost(count(&calls[0]));
        released.release().expect("a release");
        let held = locks.lock(unique_key("callback")).acquire().expect("a free lock");
        held.on_lost(count(&calls[1]));
        assert_eq!(calls[1].load(Ordering::SeqCst), 0);
        proxy.cut();
        assert!(held.wait_lost(PATIENCE));
        wait_for("the callback", || calls[1].load(Ordering::SeqCst) > 0);
        // It is lost already.
        held.on_lost(count(&calls[2]));
        assert_eq!(calls[2].load(Ordering::SeqCst), 1);
        held.release().expect_err("it is lost");
        locks.close();
        assert_eq!(calls.map(|calls| calls.load(Ordering::SeqCst)), [0, 1, 1]);
    }

    fn a_panic_in_the_body_frees_the_lock<C: Lockable>(server: &Server) {
        let _alone = alone();
        let locks = LockManager::<C>::at(&server.url).build();
        let key = unique_key("body_panics");
        let body = || locks.lock(&key).run(|_| -> Result<(), Error> { panic!("on purpose") });
        catch_unwind(AssertUnwindSafe(body)).expect_err("the panic goes on");
        let mut other = C::open(server);
        let taken = other.advisory_lock(&key).timeout(PATIENCE).acquire();
        taken.expect("the lock is free").release().expect("a release");
        locks.close();
    }

    fn a_process_that_was_stopped_knows_it_when_it_goes_on<C: Lockable>(server: &Server) {
        let _alone = alone();
        let key = unique_key("stopped");
        let mut command = Command::new(env::current_exe().expect("this program"));
        command
            .args(["--exact", "the_child_that_is_stopped", "--ignored", "--nocapture"])
            .env("DLOCK_CHILD_URL", &server.url)
            .env("DLOCK_CHILD_KEY", &key);
        let mut child = Process::spawn(command);
        while !child.line().contains("held") {}
        let pid = Pid::from_raw(child.id().try_into().expect("a process"));
        kill(pid, Signal::SIGSTOP).expect("it stops");
        let mut conn = C::open(server);
        let lock = conn.advisory_lock(&key).timeout(PATIENCE).acquire().expect("the lease ends");
        let granted = now();
        kill(pid, Signal::SIGCONT).expect("it goes on");
        let last = loop {
            if let Some(last) = child.line().strip_prefix("held until ") {
                break Duration::from_micros(last.parse().expect("a number"));
            }
        };
        assert!(last < granted, "it held the lock {:?} longer", last - granted);
        lock.release().expect("a release");
    }
}

#[test]
#[ignore = "it is the child of another test"]
fn the_child_that_is_stopped() {
    let url = env::var("DLOCK_CHILD_URL").expect("a parent");
    match url.starts_with("mysql") {
        true => hold::<MysqlConnection>(&url),
        false => hold::<PgConnection>(&url),
    }
}

fn hold<C: Lockable>(url: &str) {
    let key = env::var("DLOCK_CHILD_KEY").expect("a parent");
    let locks = LockManager::<C>::at(url)
        .lease(Duration::from_secs(1))
        .build();
    let held = locks.lock(key).acquire().expect("a free lock");
    // Before the parent knows, who stops it at once.
    let mut last = now();
    println!("\nheld");
    loop {
        let looked = now();
        if held.is_lost() {
            break;
        }
        last = looked;
    }
    println!("\nheld until {}", last.as_micros());
}

on_postgres! {
    fn a_pooler_that_pools_transactions_is_refused(server: &Server) {
        let pooler = start_transaction_pooler(server);
        let locks = LockManager::<PgConnection>::at(&pooler.url).build();
        let refused = locks.lock(unique_key("pooled")).acquire();
        match refused {
            Err(Error::Unsupported { source, .. }) => {
                assert!(source.to_string().contains("pooler"), "{source}");
            }
            other => panic!("{other:?}"),
        }
        // The pooler itself is in order.
        PgConnection::open(&pooler).execute_sql("SELECT 1");
        // So it is not refused because of the pooler's address, but because of what it does.
        let locks = LockManager::<PgConnection>::at(&server.url).build();
        let held = locks.lock(unique_key("pooled")).acquire().expect("a free lock");
        held.release().expect("a release");
    }
}
