//! Walks a conversation: each answer that the server can give, and at each step the end of the caller.

use std::fmt::Debug;
use std::time::Duration;

use dlock_core::LockKey;
use dlock_core::proto::{
    Abandoned, Aftermath, Answer, Ask, ErrorFields, Failure, Machine, Session, Step, Wait,
};

pub(crate) const OUTSIDE: Session = Session {
    depth: None,
    test_transaction: false,
};

pub(crate) const KEYS: usize = 3;

/// How often this session holds each of the keys, which others hold, and what the session remembers.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct World {
    pub(crate) holds: [u32; KEYS],
    pub(crate) taken: [bool; KEYS],
    /// The mark of the last request that was granted; on MySQL of the last one.
    pub(crate) mark: i64,
    /// MySQL: the place of the first that the last release did not find, or 0.
    pub(crate) released: i64,
    /// MySQL: how many the last request has got.
    pub(crate) got: i64,
    /// PostgreSQL: the session has forgotten its prepared statements.
    pub(crate) forgot: bool,
    pub(crate) ended: bool,
    /// SQLite: each hold by its request.
    pub(crate) requests: Vec<(usize, i64)>,
    /// PostgreSQL: the open transaction.
    pub(crate) transaction: Option<Transaction>,
}

/// A transaction of PostgreSQL.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Transaction {
    pub(crate) aborted: bool,
    /// The locks that end with it.
    pub(crate) locks: [bool; KEYS],
    /// Each with the locks that were there before it.
    pub(crate) savepoints: Vec<(String, [bool; KEYS])>,
    /// `transaction_timeout` does not count.
    pub(crate) lifted: bool,
}

impl World {
    /// Nothing was left behind. That the transaction is aborted now is no trace.
    fn is_as(&self, before: &World) -> bool {
        let same_transaction = match (&before.transaction, &self.transaction) {
            (None, None) => true,
            (Some(before), Some(now)) => now.aborted || now == before,
            _ => false,
        };
        self.holds == before.holds && same_transaction
    }
}

/// The session holds all locks once more.
pub(crate) fn session_has_all(before: &World, now: &World) -> bool {
    now.holds == before.holds.map(|holds| holds + 1) && now.transaction == before.transaction
}

/// What the server can answer, and what the session is then.
pub(crate) struct Outcome {
    pub(crate) answer: Answer,
    pub(crate) world: World,
    pub(crate) fault: bool,
}

pub(crate) fn fine(answer: Answer, world: World) -> Outcome {
    Outcome {
        answer,
        world,
        fault: false,
    }
}

pub(crate) fn fault(world: World) -> Outcome {
    Outcome {
        answer: Answer::Error(ErrorFields::default()),
        world,
        fault: true,
    }
}

fn lost(world: &World) -> Outcome {
    Outcome {
        answer: Answer::Error(ErrorFields {
            lost: true,
            ..ErrorFields::default()
        }),
        world: World {
            ended: true,
            ..world.clone()
        },
        fault: true,
    }
}

/// A server that obeys what the machines send.
pub(crate) trait Server {
    /// What it can answer to a step, and whether the step asks for locks or gives them back.
    fn receive<T: Debug>(&self, world: &World, step: &Step<T>) -> (Vec<Outcome>, bool);
    /// Obeys a message whose answer nobody reads.
    fn obey(&self, world: &mut World, message: &str);
    /// Whether an abandoned request is given up by its number.
    fn give_up(&self, _world: &mut World, _request: i64) {}
}

trait Talks<T> {
    fn next(&mut self, answer: Answer, now: Duration) -> Step<T>;
    fn abandon(&self) -> Abandoned;
}

impl<M: Machine> Talks<M::Output> for M {
    fn next(&mut self, answer: Answer, now: Duration) -> Step<M::Output> {
        Machine::next(self, answer, now)
    }

    fn abandon(&self) -> Abandoned {
        Machine::abandon(self)
    }
}

/// Asks for all keys, in another order than the server's, and polls.
pub(crate) fn ask(keys: [LockKey; KEYS], limit: Option<Duration>, droppable: bool) -> Ask {
    let [first, second, third] = keys;
    Ask {
        wait: Wait {
            limit,
            poll: Some(Duration::from_millis(50)),
        },
        droppable,
        cancellable: droppable,
        name_holders: false,
        ..Ask::all([third, first.clone(), second, first])
    }
}

/// How many conversations there were, and how many were granted.
#[derive(Debug, Default)]
pub(crate) struct Count {
    pub(crate) all: usize,
    pub(crate) granted: usize,
    pub(crate) failed: usize,
    pub(crate) gave_up: usize,
}

/// Explores all conversations. `granted` looks at each hold.
pub(crate) fn explore<T: Debug, M: Machine<Output = Option<T>>>(
    server: &impl Server,
    before: &World,
    machine: impl Fn() -> M,
    droppable: bool,
    has_all: fn(&World, &World) -> bool,
    mut granted: impl FnMut(T, &World),
) -> Count {
    const FAULTS: usize = 2;
    const SLEEPS: usize = 2;
    let mut count = Count::default();
    let mut paths: Vec<Vec<usize>> = vec![Vec::new()];
    while let Some(path) = paths.pop() {
        let (mut world, mut now) = (before.clone(), Duration::from_secs(5));
        let (mut machine, mut step) = started(&machine, before, now);
        let talks: &mut dyn Talks<Option<T>> = &mut machine;
        let (mut faults, mut sleeps, mut at) = (0, 0, 0);
        let mut taken_path = Vec::new();
        loop {
            if let Step::Done(result) = step {
                count.all += 1;
                match &result {
                    Ok(Some(_)) => count.granted += 1,
                    Ok(None) => count.gave_up += 1,
                    Err(_) => count.failed += 1,
                }
                ended(before, &world, &result, &taken_path, has_all);
                if let Ok(Some(hold)) = result {
                    granted(hold, &world);
                }
                break;
            }
            let (mut outcomes, asks) = match &step {
                Step::Sleep(duration) => {
                    assert!(*duration > Duration::ZERO);
                    now += *duration;
                    sleeps += 1;
                    // Others release, take, or do nothing.
                    let mut outcomes = vec![fine(Answer::Done, world.clone())];
                    for key in 0..KEYS {
                        let mut next = world.clone();
                        next.taken[key] = !next.taken[key] && next.holds[key] == 0;
                        if next != world {
                            outcomes.push(fine(Answer::Done, next));
                        }
                    }
                    (outcomes, true)
                }
                step => {
                    let (mut outcomes, asks) = server.receive(&world, step);
                    outcomes.push(lost(&world));
                    (outcomes, asks)
                }
            };
            if droppable {
                let abandoned = talks.abandon();
                abandoned_at(server, before, &world, &outcomes, &abandoned, asks, &step);
            }
            if sleeps > SLEEPS {
                break;
            }
            outcomes.retain(|outcome| !outcome.fault || faults < FAULTS);
            let choice = match path.get(at) {
                Some(choice) => *choice,
                None => {
                    for other in 1..outcomes.len() {
                        let mut next: Vec<usize> = taken_path.clone();
                        next.push(other);
                        paths.push(next);
                    }
                    0
                }
            };
            taken_path.push(choice);
            at += 1;
            let outcome = outcomes.swap_remove(choice);
            faults += usize::from(outcome.fault);
            world = outcome.world;
            step = talks.next(outcome.answer, now);
        }
    }
    count
}

/// Inside a transaction: a conversation whose savepoint has a name that no other one has left over. With such a name it
/// asks first.
fn started<M: Machine>(
    machine: impl Fn() -> M,
    before: &World,
    now: Duration,
) -> (M, Step<M::Output>) {
    loop {
        let mut machine = machine();
        let step = machine.start(now);
        match &step {
            Step::Query(_) if before.transaction.is_some() => std::mem::forget(machine),
            _ => return (machine, step),
        }
    }
}

fn ended<T>(
    before: &World,
    now: &World,
    result: &Result<Option<T>, Failure>,
    path: &[usize],
    has_all: fn(&World, &World) -> bool,
) {
    let as_before = now.is_as(before);
    match result {
        Ok(Some(_)) => {
            assert!(has_all(before, now), "granted, by {path:?}: {now:?}");
        }
        Ok(None) => assert!(as_before, "gave up, by {path:?}: {now:?}"),
        Err(failure) => match failure.aftermath {
            Aftermath::Clean => assert!(as_before, "{failure:?}, by {path:?}: {now:?}"),
            Aftermath::MarkBroken => {
                assert!(as_before || now.ended, "{failure:?}, by {path:?}: {now:?}");
            }
            // The end of the session frees all.
            Aftermath::EndSession | Aftermath::EndSessionUnread => {}
        },
    }
}

/// The message that was on its way is obeyed, or it is not, and then those that are sent behind it.
fn abandoned_at<T: Debug>(
    server: &impl Server,
    before: &World,
    world: &World,
    outcomes: &[Outcome],
    abandoned: &Abandoned,
    asks: bool,
    step: &Step<T>,
) {
    let unsent = fine(Answer::Done, world.clone());
    let obeyed = outcomes.iter().map(|outcome| (outcome, true));
    for (outcome, sent) in obeyed.chain([(&unsent, false)]) {
        if outcome.world.ended {
            continue;
        }
        let mut world = outcome.world.clone();
        for message in &abandoned.messages {
            server.obey(&mut world, message);
        }
        for request in &abandoned.requests {
            server.give_up(&mut world, request.0);
        }
        if let Step::Query(statement) = step {
            if let Some(request) = statement.request {
                server.give_up(&mut world, request.0);
            }
        }
        let as_before = world.is_as(before);
        // Outer guards never lose a hold.
        let outer = world.holds.iter().zip(before.holds);
        let keeps = outer.clone().all(|(now, before)| *now >= before);
        assert!(keeps || outcome.fault, "{step:?} {abandoned:?} {world:?}");
        // An open transaction ends with its connection.
        let must = asks && sent && !outcome.fault && before.transaction.is_none();
        assert!(
            as_before || (abandoned.broken && !must),
            "abandoned {step:?}: {abandoned:?}\nbefore {before:?}\nnow {world:?}"
        );
    }
}

/// Plays a conversation to its end, with the first answer that the server gives.
pub(crate) fn play<M: Machine>(
    server: &impl Server,
    world: &mut World,
    mut machine: M,
) -> Result<M::Output, Failure>
where
    M::Output: Debug,
{
    let now = Duration::from_secs(5);
    let mut step = machine.start(now);
    loop {
        if let Step::Done(result) = step {
            return result;
        }
        let (mut outcomes, _) = server.receive(world, &step);
        let outcome = outcomes.swap_remove(0);
        *world = outcome.world;
        step = machine.next(outcome.answer, now);
    }
}

/// All ways in which others can hold the keys, and this session before.
pub(crate) fn worlds() -> impl Iterator<Item = World> {
    let taken = (0..1 << KEYS).map(|bits| std::array::from_fn(|key| bits >> key & 1 == 1));
    taken.flat_map(|taken: [bool; KEYS]| {
        let outer = (0..=KEYS).filter_map(move |held| {
            let mut holds = [0; KEYS];
            if held < KEYS {
                if taken[held] {
                    return None;
                }
                holds[held] = 1;
            }
            Some(World {
                holds,
                taken,
                ..World::default()
            })
        });
        outer.collect::<Vec<_>>()
    })
}
