use dlock_core::Mode::{self, Exclusive, Shared};

use super::Requested::{Blocked, Deadlock, Ready};
use super::{Changed, Queue, Request, Requested};

type Owner = u32;
type Id = u64;
type TestQueue = Queue<&'static str, Owner, Id>;

fn ask(queue: &mut TestQueue, key: &'static str, owner: Owner, id: Id, mode: Mode) -> Requested {
    queue.request(key, Request { id, owner, mode })
}

/// Asks for a lock that must be free, and takes it.
#[track_caller]
fn hold(queue: &mut TestQueue, key: &'static str, owner: Owner, id: Id, mode: Mode) {
    assert_eq!(ask(queue, key, owner, id, mode), Ready);
    let _ = queue.grant(id).expect("it is ready");
}

#[track_caller]
fn ready(changed: Option<Changed<&'static str, Id>>) -> Vec<Id> {
    changed.expect("a change").ready
}

fn holders(queue: &TestQueue, key: &'static str) -> Vec<Id> {
    queue.holders(&key).map(|holder| holder.id).collect()
}

fn waiters(queue: &TestQueue, key: &'static str) -> Vec<Id> {
    queue.waiters(&key).map(|waiter| waiter.id).collect()
}

#[track_caller]
fn assert_empty(queue: &TestQueue) {
    assert!(queue.lines.is_empty(), "{queue:?}");
    assert!(queue.keys.is_empty(), "{queue:?}");
    assert!(queue.owned.is_empty(), "{queue:?}");
}

#[test]
fn a_free_lock_is_ready_and_held_once_it_is_granted() {
    let mut queue = TestQueue::default();
    assert_eq!(ask(&mut queue, "a", 1, 10, Exclusive), Ready);
    assert!(queue.is_ready(10) && queue.is_waiting(1));
    assert!(!queue.is_held_by(&"a", 1));
    assert_eq!(
        queue.waiter(10).map(|(key, waiter)| (*key, waiter.owner)),
        Some(("a", 1))
    );

    let granted = queue.grant(10).expect("it is ready");
    let expected = Changed {
        key: "a",
        mode: Exclusive,
        ready: vec![],
    };
    assert_eq!(granted, expected);
    assert!(queue.is_held_by(&"a", 1) && !queue.is_waiting(1));
    assert_eq!(queue.waiter(10), None);
    assert_eq!(
        (holders(&queue, "a"), waiters(&queue, "a")),
        (vec![10], vec![])
    );

    assert_eq!(queue.release(10), Some(expected));
    assert_empty(&queue);
}

#[test]
fn what_is_not_ready_is_not_granted() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 10, Exclusive);
    assert_eq!(ask(&mut queue, "a", 2, 20, Exclusive), Blocked);
    assert_eq!(queue.grant(20), None, "blocked");
    assert_eq!(queue.grant(10), None, "held already");
    assert_eq!(queue.grant(99), None, "unknown");
    assert_eq!(holders(&queue, "a"), [10]);
}

#[test]
fn a_hold_is_released_and_a_wait_is_cancelled() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 10, Exclusive);
    assert_eq!(ask(&mut queue, "a", 2, 20, Exclusive), Blocked);
    assert_eq!(queue.cancel(10), None);
    assert_eq!(queue.release(20), None);
    assert!(queue.contains(10) && queue.contains(20));

    assert_eq!(ready(queue.cancel(20)), []);
    assert_eq!(ready(queue.release(10)), []);
    assert_eq!((queue.cancel(20), queue.release(10)), (None, None));
    assert_empty(&queue);
}

#[test]
fn first_come_first_served() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 1, Exclusive);
    for id in 2..=4 {
        assert_eq!(ask(&mut queue, "a", id as Owner, id, Exclusive), Blocked);
    }
    for id in 1..=3 {
        assert_eq!(ready(queue.release(id)), [id + 1]);
        assert_eq!(ready(queue.grant(id + 1)), []);
    }
    assert_eq!(ready(queue.release(4)), []);
    assert_empty(&queue);
}

#[test]
fn a_waiter_whose_turn_it_is_keeps_later_ones_waiting() {
    let mut queue = TestQueue::default();
    assert_eq!(ask(&mut queue, "a", 1, 1, Exclusive), Ready);
    assert_eq!(ask(&mut queue, "a", 2, 2, Exclusive), Blocked);
    assert_eq!(ask(&mut queue, "a", 3, 3, Shared), Blocked);
    assert_eq!(ready(queue.cancel(1)), [2]);
    assert!(!queue.is_ready(3));
}

#[test]
fn keys_do_not_block_each_other() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 1, Exclusive);
    hold(&mut queue, "b", 2, 2, Exclusive);
    assert_eq!(ask(&mut queue, "b", 1, 3, Exclusive), Blocked);
    assert_eq!(ready(queue.release(1)), []);
    assert_eq!(ready(queue.release(2)), [3]);
}

#[test]
fn readers_hold_together_and_a_writer_alone() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 1, Shared);
    hold(&mut queue, "a", 2, 2, Shared);
    assert_eq!(ask(&mut queue, "a", 3, 3, Exclusive), Blocked);
    assert_eq!(ready(queue.release(1)), []);
    assert_eq!(ready(queue.release(2)), [3]);
    let _ = queue.grant(3).expect("it is ready");
    assert_eq!(ask(&mut queue, "a", 4, 4, Shared), Blocked);
    assert_eq!(ask(&mut queue, "a", 5, 5, Shared), Blocked);
    assert_eq!(ready(queue.release(3)), [4, 5]);
}

#[test]
fn readers_that_are_ready_together_are_granted_in_any_order() {
    let mut queue = TestQueue::default();
    assert_eq!(ask(&mut queue, "a", 1, 1, Shared), Ready);
    assert_eq!(ask(&mut queue, "a", 2, 2, Shared), Ready);
    assert_eq!(ready(queue.grant(2)), [1]);
    assert_eq!(ready(queue.grant(1)), []);
    assert_eq!(holders(&queue, "a"), [2, 1]);
}

#[test]
fn a_writer_goes_before_readers_that_come_later() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 1, Shared);
    assert_eq!(ask(&mut queue, "a", 2, 2, Exclusive), Blocked);
    assert_eq!(ask(&mut queue, "a", 3, 3, Shared), Blocked);
    assert_eq!(waiters(&queue, "a"), [2, 3]);
    assert_eq!(ready(queue.release(1)), [2]);
    assert_eq!(ready(queue.grant(2)), []);
    assert_eq!(ready(queue.release(2)), [3]);
}

#[test]
fn a_waiter_in_the_middle_goes_and_frees_the_way_for_those_behind_it() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 1, Shared);
    assert_eq!(ask(&mut queue, "a", 2, 2, Shared), Ready);
    assert_eq!(ask(&mut queue, "a", 3, 3, Exclusive), Blocked);
    assert_eq!(ask(&mut queue, "a", 4, 4, Shared), Blocked);
    assert_eq!(ask(&mut queue, "a", 5, 5, Exclusive), Blocked);
    assert_eq!(ask(&mut queue, "a", 6, 6, Shared), Blocked);

    assert_eq!(ready(queue.cancel(3)), [2, 4]);
    assert_eq!(waiters(&queue, "a"), [2, 4, 5, 6]);
    assert_eq!(ready(queue.cancel(5)), [2, 4, 6]);
}

#[test]
fn an_owner_takes_what_it_holds_again_and_passes_those_who_wait_for_it() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 1, Exclusive);
    assert_eq!(ask(&mut queue, "a", 2, 2, Exclusive), Blocked);
    hold(&mut queue, "a", 1, 3, Exclusive);
    hold(&mut queue, "a", 1, 4, Shared);
    assert_eq!(holders(&queue, "a"), [1, 3, 4]);

    // It is free when the last hold is released, in whatever order.
    assert_eq!(ready(queue.release(3)), []);
    assert_eq!(ready(queue.release(1)), []);
    assert_eq!(ready(queue.release(4)), [2]);
}

#[test]
fn a_reader_joins_itself_in_front_of_a_writer() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 1, Shared);
    assert_eq!(ask(&mut queue, "a", 2, 2, Exclusive), Blocked);
    hold(&mut queue, "a", 1, 3, Shared);
    assert_eq!(ready(queue.release(1)), []);
    assert_eq!(ready(queue.release(3)), [2]);
}

#[test]
fn a_reader_that_wants_the_lock_alone_waits_for_readers_and_for_no_writer() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 1, Shared);
    hold(&mut queue, "a", 2, 2, Shared);
    assert_eq!(ask(&mut queue, "a", 3, 3, Exclusive), Blocked);
    assert_eq!(ask(&mut queue, "a", 1, 4, Exclusive), Blocked);
    assert_eq!(ready(queue.release(2)), [4]);
    assert_eq!(ready(queue.grant(4)), []);
    assert_eq!(
        ready(queue.release(4)),
        [],
        "the shared hold is still there"
    );
    assert_eq!(ready(queue.release(1)), [3]);
}

#[test]
fn two_readers_that_both_want_the_lock_alone_are_a_deadlock() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 1, Shared);
    hold(&mut queue, "a", 2, 2, Shared);
    assert_eq!(ask(&mut queue, "a", 1, 3, Exclusive), Blocked);
    assert_eq!(ask(&mut queue, "a", 2, 4, Exclusive), Deadlock);
    assert!(!queue.contains(4) && !queue.is_waiting(2));
    assert_eq!(ready(queue.release(2)), [3]);
}

#[test]
fn a_circle_of_owners_is_a_deadlock_and_a_chain_is_none() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 1, Exclusive);
    hold(&mut queue, "b", 2, 2, Exclusive);
    hold(&mut queue, "c", 3, 3, Exclusive);
    assert_eq!(ask(&mut queue, "b", 1, 4, Exclusive), Blocked);
    assert_eq!(ask(&mut queue, "c", 2, 5, Shared), Blocked);
    assert_eq!(ask(&mut queue, "a", 3, 6, Shared), Deadlock);
    hold(&mut queue, "d", 3, 7, Exclusive);

    // The way out of the others is still there.
    assert_eq!(ready(queue.release(3)), [5]);
    let _ = queue.grant(5).expect("it is ready");
    assert_eq!(ready(queue.release(2)), [4]);
}

#[test]
fn a_circle_may_lead_through_a_waiter_that_holds_nothing() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 1, Shared);
    hold(&mut queue, "b", 2, 2, Exclusive);
    // The writer waits for 1, the reader 2 for the writer, and 1 for the reader.
    assert_eq!(ask(&mut queue, "a", 3, 3, Exclusive), Blocked);
    assert_eq!(ask(&mut queue, "a", 2, 4, Shared), Blocked);
    assert_eq!(ask(&mut queue, "b", 1, 5, Exclusive), Deadlock);
    assert_eq!(ready(queue.cancel(3)), [4]);
    assert_eq!(ask(&mut queue, "b", 1, 6, Exclusive), Blocked);
}

#[test]
fn owners_list_what_they_hold() {
    let mut queue = TestQueue::default();
    hold(&mut queue, "a", 1, 1, Exclusive);
    hold(&mut queue, "b", 1, 2, Shared);
    hold(&mut queue, "b", 2, 3, Shared);
    assert_eq!(ask(&mut queue, "b", 1, 4, Exclusive), Blocked);
    let held: Vec<_> = queue
        .held_by(1)
        .map(|(key, held)| (*key, held.id))
        .collect();
    assert_eq!(held, [("a", 1), ("b", 2)]);
    assert_eq!(queue.held_by(3).count(), 0);
}

/// Owners that ask, take, release and give up at random: nobody holds against another owner, nobody waits in a circle,
/// and in the end everybody gets through.
#[test]
fn nobody_holds_against_another_owner_or_waits_for_ever() {
    const KEYS: [&str; 3] = ["a", "b", "c"];
    const OWNERS: Owner = 5;

    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 33) as usize % below
    };
    let (mut grants, mut deadlocks) = (0, 0);
    for _ in 0..300 {
        let mut queue = TestQueue::default();
        let mut ids = 0;
        for _ in 0..60 {
            let owner = random(OWNERS as usize) as Owner;
            let wait = KEYS
                .iter()
                .flat_map(|key| queue.waiters(key))
                .find(|waiter| waiter.owner == owner);
            match (wait, random(4)) {
                // An owner that waits does nothing else.
                (Some(wait), 0) => {
                    let _ = queue.cancel(wait.id).expect("it waits");
                }
                (Some(wait), _) => grants += usize::from(queue.grant(wait.id).is_some()),
                (None, 0) => {
                    let held = queue.held_by(owner).next().map(|(_, held)| held.id);
                    assert!(held.is_none_or(|id| queue.release(id).is_some()));
                }
                (None, _) => {
                    ids += 1;
                    let mode = [Exclusive, Shared][random(2)];
                    let asked = ask(&mut queue, KEYS[random(3)], owner, ids, mode);
                    deadlocks += usize::from(asked == Deadlock);
                }
            }
            assert_exclusion(&queue, &KEYS);
        }
        get_through(&mut queue, &KEYS, OWNERS);
        assert_empty(&queue);
    }
    assert!(grants > 1_000 && deadlocks > 100, "{grants}, {deadlocks}");
}

#[track_caller]
fn assert_exclusion(queue: &TestQueue, keys: &[&'static str]) {
    for key in keys {
        for one in queue.holders(key) {
            for other in queue.holders(key).filter(|other| other.owner != one.owner) {
                assert_eq!((one.mode, other.mode), (Shared, Shared), "{queue:?}");
            }
        }
    }
}

/// Grants what is ready, and has owners that do not wait release everything, until nobody is left.
#[track_caller]
fn get_through(queue: &mut TestQueue, keys: &[&'static str], owners: Owner) {
    loop {
        let waiting: Vec<_> = keys.iter().flat_map(|key| queue.waiters(key)).collect();
        let granted = waiting
            .iter()
            .filter(|waiter| queue.grant(waiter.id).is_some());
        let mut moved = granted.count();
        for owner in (0..owners)
            .filter(|owner| !queue.is_waiting(*owner))
            .collect::<Vec<_>>()
        {
            let held: Vec<_> = queue.held_by(owner).map(|(_, held)| held.id).collect();
            for id in held {
                moved += usize::from(queue.release(id).is_some());
            }
        }
        if moved == 0 {
            assert!(waiting.is_empty(), "they wait for ever: {queue:?}");
            return;
        }
    }
}
