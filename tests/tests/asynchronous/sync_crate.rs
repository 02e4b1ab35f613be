//! The locks of the sync crate and of this one are the same.

use std::time::Duration;

use dlock_diesel::AdvisoryLockExt as SyncAdvisoryLockExt;
use dlock_diesel_async::{AdvisoryLockExt, Error, LockKey};
use dlock_tests::{Server, TestConnection, on_every_network_server_async, unique_key};

use crate::support::*;

const SHORT: Duration = Duration::from_millis(20);

on_every_network_server_async! {
    async fn the_sync_crate_and_this_one_exclude_each_other_by_every_form_of_key<C: LockTest>(server: &Server) {
        let text = unique_key("async_forms");
        let number = text.bytes().fold(0, |hash: i64, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        let pair = ((number >> 32) as i32, number as i32);
        let uppercase = text.to_uppercase() + " É\0🦀 ";
        let bytes = [b"\xff\xfe".as_slice(), text.as_bytes()].concat();
        let keys = [
            LockKey::from(&text),
            LockKey::from(uppercase),
            LockKey::from("long/".repeat(40) + &text),
            LockKey::from(bytes),
            LockKey::from(number),
            LockKey::from(pair),
            LockKey::namespaced(&text, 7),
            LockKey::namespaced("billing", LockKey::namespaced(&text, (1, -1))),
        ];
        let (mut conn, mut sync) = (C::open(server).await, C::observer(server));
        let (id, sync_id) = (conn.backend_id().await, sync.backend_id());
        let mut observer = C::observer(server);
        for key in &keys {
            let lock = conn.advisory_lock(key).acquire().await.expect("a free lock");
            assert_eq!(holders(&mut observer, key), [id], "{key}");
            assert!(SyncAdvisoryLockExt::advisory_lock(&mut sync, key).try_acquire().expect("a try").is_none(), "{key}");
            let other_keys = keys.iter().filter(|other| *other != key);
            for other in other_keys {
                let free = SyncAdvisoryLockExt::advisory_lock(&mut sync, other).try_acquire().expect("a try");
                free.unwrap_or_else(|| panic!("{other} is not {key}")).release().expect("a release");
            }
            lock.release().await.expect("a release");

            let lock = SyncAdvisoryLockExt::advisory_lock(&mut sync, key).acquire().expect("a free lock");
            assert_eq!(holders(&mut observer, key), [sync_id], "{key}");
            assert!(conn.advisory_lock(key).try_acquire().await.expect("a try").is_none(), "{key}");
            let error = conn.advisory_lock(key).timeout(SHORT).transaction(async |_| Ok(())).await;
            assert!(matches!(error, Err(Error::Timeout { .. })), "{key}: {error:?}");
            lock.release().expect("a release");
            assert_free(&mut observer, key);
        }
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_waiter_of_this_crate_is_granted_what_the_sync_crate_releases<C: LockTest>(server: &Server) {
        let key = unique_key("async_after_sync");
        let (mut sync, mut observer) = (C::observer(server), C::observer(server));
        let held = SyncAdvisoryLockExt::advisory_lock(&mut sync, &key).acquire().expect("a free lock");
        let waiter = in_background(server, {
            let key = key.clone();
            async move |mut conn: C, stage: Stage| {
                let lock = conn.advisory_lock(&key).acquire().await.expect("the lock");
                stage.pause().await;
                lock.release().await.expect("a release");
            }
        })
        .await;
        waiter.waits(&mut observer);
        held.release().expect("a release");
        waiter.holds(&mut observer, &key);
        waiter.go_on();
        waiter.join().await;
        assert_free(&mut observer, &key);
    }
}
