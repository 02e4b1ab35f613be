//! The callbacks of those who hold a lock of a manager.

use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use dlock_diesel::{AdvisoryLockExt, Error};
use dlock_tests::{PATIENCE, Server, on_every_network_server, unique_key};

use crate::managed::*;
use crate::support::*;

on_every_network_server! {
    fn a_callback_of_a_manager_that_panics_harms_nobody<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let (key, taken) = (unique_key("callback_panics"), unique_key("callback_taken"));
        let held = locks.lock(&key).acquire().expect("a free lock");
        // A wait opens a second connection, which then holds nothing.
        let mut other = C::open(server);
        let theirs = other.advisory_lock(&taken).acquire().expect("a free lock");
        let waiter = start({
            let (locks, taken) = (locks.clone(), taken.clone());
            move || locks.lock(&taken).acquire().expect("the lock").release()
        });
        // Likely in the queue by now.
        pause(Duration::from_millis(200));
        theirs.release().expect("a release");
        waiter.join().expect("a release");

        let (tells, told) = channel();
        held.on_lost(|| panic_quietly());
        held.on_lost(move || tells.send(()).expect("a test"));
        let (gets, got) = channel();
        let waiter = thread::spawn({
            let (locks, key) = (locks.clone(), key.clone());
            move || gets.send(locks.lock(&key).acquire().map(drop)).expect("a test")
        });
        pause(Duration::from_millis(200));
        let [id] = holders(&mut observer, &key)[..] else { panic!("one session holds it") };
        observer.kill(id);
        got.recv_timeout(PATIENCE).expect("the waiter does not hang").expect("the lock");
        told.recv_timeout(PATIENCE).expect("the next callback is called");
        waiter.join().expect("no panic");
        locks.close();
    }

    /// The callback comes from the thread that closes the manager, and from the one whose session is ended.
    fn a_callback_closes_its_manager<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        for is_killed in [false, true] {
            let locks = manager::<C>(&server.url).build();
            let key = unique_key("callback_closes");
            let held = locks.lock(&key).acquire().expect("a free lock");
            let (tells, told) = channel();
            held.on_lost({
                let (locks, tells) = (locks.clone(), tells.clone());
                move || {
                    locks.close();
                    tells.send(thread::current().id()).expect("a test");
                }
            });
            let [id] = holders(&mut observer, &key)[..] else { panic!("one session holds it") };
            if is_killed {
                observer.kill(id);
                told.recv_timeout(PATIENCE).expect("the callback ends");
            }
            let (closes, closed) = channel();
            let closer = thread::spawn({
                let locks = locks.clone();
                move || {
                    locks.close();
                    closes.send(()).expect("a test");
                }
            });
            let closer_id = closer.thread().id();
            closed.recv_timeout(PATIENCE).expect("it is closed");
            closer.join().expect("no panic");
            if !is_killed {
                let caller = told.try_recv().expect("whoever closes waits for the callback");
                assert_ne!(caller, closer_id, "the callback has a thread of its own");
            }
            let again = locks.lock(&key).acquire();
            assert!(matches!(again, Err(Error::ManagerClosed { .. })), "{again:?}");
            wait_until_free(&mut observer, &key);
        }
    }
}
