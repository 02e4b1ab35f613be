//! Draws whose future is dropped.

use std::pin::pin;
use std::task::{Context, Waker};

use dlock_diesel_async::AdvisoryLockExt;
use dlock_tests::{Kind, Server, on_every_server_async, unique_key};

use crate::support::*;

on_every_server_async! {
    async fn a_draw_that_is_dropped_skips_a_number_at_most<C: LockTest>(server: &Server) {
        let key = unique_key("fence_dropped");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let first = lock.fencing_token().await.expect("a token");
        // A busy machine may have the answer before the poll ends; then nothing is dropped.
        let mut dropped = 0;
        while dropped < if C::KIND == Kind::Mysql { 1 } else { 3 } {
            let draw = pin!(lock.fencing_token());
            dropped += u32::from(draw.poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        if C::KIND == Kind::Mysql {
            // It would give the answer to the next query.
            assert!(is_broken(&mut *lock));
            let next = lock.fencing_token().await;
            assert!(matches!(next, Err(dlock_diesel_async::Error::Lost { .. })), "{next:?}");
            drop(lock);
            drop(conn);
            wait_until_free(&mut observer, &key);
            return;
        }
        assert_held_by(&mut observer, &key, id);
        assert!(lock.fencing_token().await.expect("a token") > first);
        lock.release().await.expect("a release");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }
}
