//! Futures of semaphores can be dropped at any point: neither a slot nor the gate stays behind, and no connection goes out
//! of step.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use dlock_diesel_async::{AdvisoryLockExt, AdvisorySemaphore, Error};
use dlock_tests::{
    Kind, Server, on_every_network_server_async, on_every_server_async, unique_key, wait_for_within,
};

use crate::both::semaphore::{assert_all_free, gate, looking, slot};
use crate::support::*;

const PERMITS: u32 = 2;

/// Until the slots and the gate are free, once the connection is closed: a turn has to end on PostgreSQL, and on MySQL
/// and MariaDB the server has to notice, which it does each second. The rest is for a busy machine.
const FREE: Duration = Duration::from_secs(6);

/// A future of the crate.
#[derive(Clone, Copy, Debug)]
enum Call {
    Acquire,
    TryAcquire,
    Timeout,
    PollEvery,
    Run,
    Transaction,
    InsideTransaction,
    Release,
    Holders,
}

const CALLS: [Call; 9] = [
    Call::Acquire,
    Call::TryAcquire,
    Call::Timeout,
    Call::PollEvery,
    Call::Run,
    Call::Transaction,
    Call::InsideTransaction,
    Call::Release,
    Call::Holders,
];

/// What others do with the slots meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Others {
    /// Nothing.
    Absent,
    /// They keep both.
    Stay,
    /// They leave one at about the moment of the drop.
    Leave,
}

async fn call<C: LockTest>(
    conn: &mut C,
    call: Call,
    key: &str,
    cancelling: bool,
) -> Result<(), Error> {
    let cancel = cancelling.then(|| conn.cancellation());
    let mut semaphore = AdvisorySemaphore::new(conn, key, PERMITS);
    if let Some(cancel) = cancel {
        semaphore = semaphore.cancel_with(cancel);
    }
    match call {
        Call::Acquire | Call::Release => {
            semaphore.acquire().await?.release().await?;
        }
        Call::TryAcquire => {
            if let Some(inside) = semaphore.try_acquire().await? {
                inside.release().await?;
            }
        }
        Call::Timeout => {
            let limit = Duration::from_millis(4);
            if let Some(inside) = semaphore.timeout(limit).try_acquire().await? {
                inside.release().await?;
            }
        }
        Call::PollEvery => {
            let semaphore = semaphore.poll_every(Duration::from_millis(2));
            semaphore.acquire().await?.release().await?;
        }
        Call::Run => semaphore.run(async |_| Ok::<(), Error>(())).await?,
        Call::Transaction => semaphore.transaction(async |_| Ok::<(), Error>(())).await?,
        Call::InsideTransaction => {
            let semaphore = semaphore.inside_transaction();
            semaphore.acquire().await?.release().await?;
        }
        Call::Holders => drop(semaphore.holders().await?),
    }
    Ok(())
}

/// Drops the future after so many polls, or after so long. `None`: it was dropped.
async fn dropped<F: Future>(future: F, polls: u32, after: Duration) -> Option<F::Output> {
    let mut future = pin!(future);
    let (begin, mut left) = (Instant::now(), polls);
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending if left == 0 || begin.elapsed() >= after => Poll::Ready(None),
        Poll::Pending => {
            left -= 1;
            let waker = context.waker().clone();
            if begin.elapsed() + Duration::from_micros(300) > after {
                waker.wake();
            } else {
                thread::sleep(Duration::from_micros(100));
                waker.wake();
            }
            Poll::Pending
        }
    })
    .await
}

/// Pseudo-random, the same in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Drops calls at every moment, and looks at what is left. Returns how many were dropped.
async fn drop_again_and_again<C: LockTest>(
    server: &Server,
    rounds: usize,
    cancelling: bool,
) -> usize {
    let key = unique_key("drops");
    let mut observer = C::observer(server);
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let (mut conn, mut count) = (None, 0);
    for round in 0..rounds {
        let what = CALLS[round % CALLS.len()];
        let others = match (numbers.below(4), what) {
            // Alone it would wait for ever, or for a limit of its own.
            (0, _) | (_, Call::Holders) => Others::Absent,
            (1, _) => Others::Stay,
            _ => Others::Leave,
        };
        let mut fresh = match conn.take() {
            Some(conn) => conn,
            None => C::open(server).await,
        };
        if matches!(what, Call::InsideTransaction) {
            begin(&mut fresh).await;
        }
        if others != Others::Absent {
            for number in 0..PERMITS {
                // A wait that was dropped may take a slot for a moment, before the server reads what was sent behind it.
                wait_for_within(FREE, format!("slot {number} in round {round}"), || {
                    try_lock(&mut observer, slot(&key, number))
                });
            }
        }
        let after = Duration::from_micros(match numbers.below(20) {
            // Into a later turn.
            0 if round % 5 == 0 => 1_100_000,
            _ => numbers.below(6_000),
        });
        let polls = match numbers.below(3) {
            0 => numbers.below(8) as u32,
            _ => u32::MAX,
        };
        let mut helper = None;
        if others == Others::Leave {
            let (mut other, freed) = (observer, numbers.below(PERMITS.into()) as u32);
            let early = Duration::from_micros(numbers.below(1_500));
            let (key, pause) = (key.clone(), after.saturating_sub(early));
            helper = Some(thread::spawn(move || {
                thread::sleep(pause);
                unlock(&mut other, slot(&key, freed));
                (other, freed)
            }));
            observer = C::observer(server);
        }
        let result = dropped(call(&mut fresh, what, &key, cancelling), polls, after).await;
        let mut freed = None;
        if let Some(helper) = helper {
            let (other, slot) = helper.join().expect("the helper");
            (observer, freed) = (other, Some(slot));
        }
        match &result {
            None => count += 1,
            Some(Ok(())) => {}
            Some(result) => panic!("{what:?} in round {round}: {result:?}"),
        }

        // What a pool would do with it.
        if is_broken(&mut fresh) || matches!(what, Call::InsideTransaction) {
            drop(fresh);
        } else {
            assert_eq!(
                fresh.number("SELECT 4711").await,
                Some(4711),
                "{what:?} in step"
            );
            assert_eq!(
                fresh.number("SELECT 4712").await,
                Some(4712),
                "{what:?} in step"
            );
            conn = Some(fresh);
        }
        let dropped = format!(
            "{what:?}, {others:?}, round {round}, dropped: {}",
            result.is_none()
        );
        if others != Others::Absent {
            for number in (0..PERMITS).filter(|number| Some(*number) != freed) {
                unlock(&mut observer, slot(&key, number));
            }
        }
        // The gate first: who has it may still take a slot.
        let slots = (0..PERMITS).map(|number| slot(&key, number));
        for lock in [gate(&key)].into_iter().chain(slots) {
            let what = format!("{lock} to be free ({dropped})");
            wait_for_within(FREE, what, || holders(&mut observer, &lock).is_empty());
        }
        if let (Some(conn), true) = (&mut conn, C::KIND != Kind::Sqlite) {
            assert_holds_nothing(conn, &mut observer).await;
        }
    }
    // What the last drop has sent may come late, and have one of them for a moment.
    for lock in [slot(&key, 0), slot(&key, 1), gate(&key)] {
        wait_for_within(FREE, format!("{lock} to be free"), || {
            try_lock(&mut observer, &lock)
        });
        unlock(&mut observer, lock);
    }
    count
}

on_every_server_async! {
    async fn drops_at_every_moment_leave_neither_a_slot_nor_the_gate<C: LockTest>(server: &'static Server) {
        let count = drop_again_and_again::<C>(server, 360, false).await;
        assert!(count >= 60, "only {count} were dropped");
    }
}

on_every_network_server_async! {
    async fn so_do_drops_that_are_cancelled<C: LockTest>(server: &'static Server) {
        let count = drop_again_and_again::<C>(server, 360, true).await;
        assert!(count >= 60, "only {count} were dropped");
    }

    async fn a_dropped_wait_that_is_cancelled_leaves_the_gate_at_once<C: LockTest>(server: &'static Server) {
        let key = unique_key("cancel_gate");
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, slot(&key, 0)));
        for attempt in 0.. {
            let mut conn = C::open(server).await;
            let id = conn.backend_id().await;
            let wait = async {
                let cancel = conn.cancellation();
                let semaphore = conn.advisory_semaphore(&key, 1).cancel_with(cancel);
                semaphore.acquire().await.map(drop)
            };
            let looks = async {
                while looking(&mut observer, &key) != [id] {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            };
            tokio::select! {
                biased;
                result = wait => panic!("it waits: {result:?}"),
                () = looks => {}
            }
            assert!(is_broken(&mut conn));
            let begin = Instant::now();
            wait_for_within(FREE, "the gate to be free", || looking(&mut observer, &key).is_empty());
            // A turn would end after 900 milliseconds. A slow machine tries again.
            if begin.elapsed() < Duration::from_millis(500) {
                break;
            }
            assert!(attempt < 10, "{:?}", begin.elapsed());
        }
        unlock(&mut observer, slot(&key, 0));
        // It is not granted it later, either.
        assert_all_free(&mut observer, &key, 1);
    }
}
