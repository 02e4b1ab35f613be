//! Every conversation with every server that there can be, and each of them abandoned at every step.

use std::fmt::{self, Debug};
use std::mem::ManuallyDrop;
use std::sync::RwLock;
use std::time::Duration;

use dlock_core::PostgresKey;
use dlock_core::proto::{
    Abandoned, Aftermath, Answer, Ask, Dialect, Failure, Hold, Machine, Postgres, Reason, Session,
    Step, StillThere, TransactionDialect, Wait,
};

use crate::common::*;
use crate::postgres_server::Does::{Nothing, Version};
use crate::postgres_server::{
    AT_ONCE, Message, Reply, Says, Session as Server, Surroundings, USUAL,
};
use crate::script::{DONE, Log, millis};

/// What the session was and what it may be now.
#[derive(Clone, PartialEq)]
struct World {
    before: Server,
    now: Server,
}

impl Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n  before {:?}\n  now    {:?}", self.before, self.now)
    }
}

impl World {
    fn new(session: Server) -> Self {
        World {
            before: session.clone(),
            now: session,
        }
    }

    /// The conversation has left no trace. That it has aborted the transaction is not a trace if that is `allowed`.
    fn is_as_before(&self, aborted: Aborted) -> bool {
        let World { before, now } = self;
        if now.ended {
            return true;
        }
        let same_transaction = now.is_open() == before.is_open()
            && match now.is_aborted() {
                true => before.is_aborted() || aborted == Aborted::Allowed,
                false => now.savepoints() == before.savepoints() && !now.transaction_holds(),
            };
        now.holds == before.holds && same_transaction && self.settings_are_as_before()
    }

    /// Settings of a transaction that is aborted go with it.
    fn settings_are_as_before(&self) -> bool {
        self.now.settings_are_the_users() || self.now.is_aborted()
    }

    /// The session holds the lock once more, and all else is as before.
    fn is_granted(&self, inside: bool) -> bool {
        let World { before, now } = self;
        let mut savepoints = before.savepoints();
        savepoints.extend(inside.then_some("own"));
        !now.ended
            && now.holds == before.holds + 1
            && now.is_open() == before.is_open()
            && !now.is_aborted()
            && !now.transaction_holds()
            && now.savepoints() == savepoints
            && now.settings_are_the_users()
    }

    /// The transaction holds the lock.
    fn is_granted_to_transaction(&self) -> bool {
        let World { before, now } = self;
        !now.ended
            && now.is_open()
            && !now.is_aborted()
            && now.transaction_holds()
            && now.holds == before.holds
            && now.savepoints() == before.savepoints()
            && now.settings_are_the_users()
    }

    /// The transaction has the lock as well, until it ends.
    fn is_granted_in_raw_transaction(&self) -> bool {
        let World { before, now } = self;
        now.holds == before.holds + 1
            && now.is_open()
            && !now.is_aborted()
            && now.settings_are_the_users()
    }

    /// Less one hold: that of the guard, and its savepoint is gone.
    fn is_released(&self) -> bool {
        let World { before, now } = self;
        let mut savepoints = before.savepoints();
        savepoints.retain(|&name| name != "own");
        let same_transaction = now.is_open() == before.is_open()
            && match now.is_aborted() {
                true => true,
                false => !before.is_aborted() && now.savepoints() == savepoints,
            };
        !now.ended
            && now.holds + 1 == before.holds
            && same_transaction
            && self.settings_are_as_before()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aborted {
    Allowed,
    Refused,
}

/// How a conversation ended.
#[derive(Debug)]
enum End {
    Holds(Option<Hold<PostgresKey>>),
    GaveUp,
    Released,
}

trait Outcome: Debug {
    fn end(self) -> End;
}

impl Outcome for Option<Hold<PostgresKey>> {
    fn end(self) -> End {
        match self {
            Some(hold) => End::Holds(Some(hold)),
            None => End::GaveUp,
        }
    }
}

impl Outcome for Option<()> {
    fn end(self) -> End {
        match self {
            Some(()) => End::Holds(None),
            None => End::GaveUp,
        }
    }
}

impl Outcome for () {
    fn end(self) -> End {
        End::Released
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    Session {
        inside: bool,
    },
    /// The driver does not know of the transaction that is open.
    InRawTransaction,
    Transaction,
    Begin,
    Release,
}

/// Walks use up names of savepoints. Who counts names does not want them at the same time.
pub(crate) static ALONE: RwLock<()> = RwLock::new(());

/// A [`Machine`], whatever its type.
trait Talks<T> {
    fn start(&mut self, now: Duration) -> Step<T>;
    fn next(&mut self, answer: Answer, now: Duration) -> Step<T>;
    fn abandon(&self) -> Abandoned;
}

impl<M: Machine> Talks<M::Output> for M {
    /// A machine that does not look at the time gets none.
    fn start(&mut self, now: Duration) -> Step<M::Output> {
        Machine::start(self, if M::TIMED { now } else { Duration::ZERO })
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Step<M::Output> {
        Machine::next(self, answer, if M::TIMED { now } else { Duration::ZERO })
    }

    fn abandon(&self) -> Abandoned {
        Machine::abandon(self)
    }
}

/// As the drivers hold it.
fn still_there<T: 'static>(machine: impl Machine<Output = T> + 'static) -> Box<dyn Talks<T>> {
    Box::new(StillThere::<Postgres, _>::new(machine))
}

/// One conversation, and what it may be about.
struct Talk<T> {
    /// Never dropped, so that its savepoint's name is not used again: each conversation begins with a name of which
    /// none is left over.
    machine: ManuallyDrop<Box<dyn Talks<T>>>,
    step: Step<T>,
    now: Duration,
    /// The name of its savepoint.
    own: Option<String>,
    /// The last message asked nothing but what the session holds, or rolled back, and it failed. Or the session holds
    /// the lock and knows no prepared statement: where the driver keeps none, that tells nothing.
    unanswered: bool,
    log: Log,
}

impl<T: Outcome> Talk<T> {
    fn start(walk: &Walk<'_, T>) -> Self {
        let start = || {
            let mut machine = ManuallyDrop::new((walk.machine)());
            let now = millis(5_000);
            let step = machine.start(now);
            Talk {
                machine,
                step,
                now,
                own: None,
                unanswered: false,
                log: Log::default(),
            }
        };
        let mut talk = loop {
            let talk = start();
            let is_inside = walk.goal == Goal::Session { inside: true };
            if !is_inside || walk.droppable || !is_held(&talk.step) {
                break talk;
            }
        };
        talk.arrive(walk);
        talk
    }

    fn arrive(&mut self, walk: &Walk<'_, T>) {
        if let Step::Batch(text) = &self.step {
            self.name(walk, text.clone().into_owned().as_str());
        }
        match &self.step {
            Step::Query(_) | Step::Batch(_) => {
                self.log.line(Message::of(&self.step, self.own.as_deref()));
            }
            other => self.log.line(other),
        }
    }

    fn name(&mut self, walk: &Walk<'_, T>, text: &str) {
        for name in names(text) {
            if walk.others.contains(&name) {
                continue;
            }
            assert_eq!(
                *self.own.get_or_insert(name.clone()),
                name,
                "another savepoint"
            );
        }
    }

    fn answer(&mut self, walk: &Walk<'_, T>, answer: Answer, took: Duration) {
        self.log.answer(&answer);
        self.now += took;
        self.step = self.machine.next(answer, self.now);
        self.arrive(walk);
    }
}

/// The names of savepoints in a text.
fn names(text: &str) -> Vec<String> {
    let behind = text.split("SAVEPOINT ").skip(1);
    let name = |rest: &str| rest.split([';', ' ']).next().unwrap_or_default().to_owned();
    behind.map(name).collect()
}

/// Many conversations with the same start.
struct Walk<'w, T> {
    machine: &'w dyn Fn() -> Box<dyn Talks<T>>,
    goal: Goal,
    wait: Wait,
    /// Whether it may be abandoned.
    droppable: bool,
    /// Savepoints of others.
    others: Vec<String>,
    /// Whether an answer may also be one to another question.
    strange: bool,
    /// What is done with each hold.
    acquired: &'w dyn Fn(&Hold<PostgresKey>, &[World]),
    conversations: usize,
}

/// An answer, and whether it left it open what the session holds.
struct Given {
    says: Says,
    took: Duration,
    unanswered: bool,
}

/// How often something may go wrong, and how often the lock may be asked for.
#[derive(Clone, Copy)]
struct Budget {
    faults: u32,
    asks: u32,
}

impl<T: Outcome> Walk<'_, T> {
    fn go(
        &mut self,
        mut talk: Talk<T>,
        given: &mut Vec<Given>,
        mut worlds: Vec<World>,
        mut budget: Budget,
    ) {
        let mut asked = false;
        while let Step::Sleep(duration) = talk.step {
            assert!(!asked, "sleeps twice");
            asked = true;
            self.all(
                &worlds,
                |world| world.is_as_before(Aborted::Refused),
                "sleeps",
            );
            self.abandoned(&talk, None, &worlds);
            talk.answer(self, DONE, duration);
        }
        if let Step::Done(_) = talk.step {
            let Step::Done(result) = std::mem::replace(&mut talk.step, Step::Sleep(AT_ONCE)) else {
                unreachable!()
            };
            self.conversations += 1;
            self.ended(&talk, result, &worlds);
            return;
        }
        let message = Message::of(&talk.step, talk.own.as_deref()).expect("not a sleep");
        self.sent(&talk, &message, &worlds);
        self.abandoned(&talk, Some(&message), &worlds);
        if message.asks() {
            if budget.asks == 0 {
                self.conversations += 1;
                return;
            }
            budget.asks -= 1;
        }

        let mut observations: Vec<(Says, Duration, bool)> = Vec::new();
        let mut replies: Vec<(World, Reply)> = Vec::new();
        for world in worlds.drain(..) {
            for reply in world.now.receive(&message) {
                let seen = observations
                    .iter_mut()
                    .find(|(says, took, _)| (*says, *took) == (reply.says, reply.took));
                match seen {
                    Some((_, _, fault)) => *fault &= reply.fault,
                    None => observations.push((reply.says, reply.took, reply.fault)),
                }
                let before = world.before.clone();
                let now = reply.session.clone();
                replies.push((World { before, now }, reply));
            }
        }
        if self.strange {
            observations.extend(message.strange_answers().map(|says| (says, AT_ONCE, true)));
        }
        observations.retain(|(_, _, fault)| budget.faults > 0 || !fault);
        let mut talk = Some(talk);
        let last = observations.len();
        for (at, (says, took, fault)) in observations.into_iter().enumerate() {
            let is_this = |reply: &Reply| (reply.says, reply.took) == (says, took);
            // What the server never says tells nothing.
            let strange = !replies.iter().any(|(_, reply)| is_this(reply));
            let mut worlds: Vec<World> = Vec::new();
            for (world, reply) in &replies {
                let told = is_this(reply) || (strange && reply.says != Says::Lost);
                if told && !worlds.contains(world) {
                    worlds.push(world.clone());
                }
            }
            let mut talk = match at + 1 == last {
                true => talk.take().expect("the last one goes on"),
                false => self.again(given),
            };
            let after_sleep = |talk: &Talk<T>| matches!(talk.step, Step::Sleep(_));
            assert!(!after_sleep(&talk));
            talk.answer(self, says.answer(), took);
            let is_silence = |says: Says| says.is_error() || says == Says::Number(3);
            talk.unanswered = match (message.statements.as_slice(), given.last()) {
                // That it is there tells nothing about the lock, and what it calls itself neither.
                ([Nothing], Some(before)) => before.unanswered,
                ([Version], Some(before)) => is_silence(before.says),
                _ => !message.asks() && is_silence(says),
            } || strange;
            if says == Says::Lost {
                assert!(
                    matches!(talk.step, Step::Done(_)),
                    "goes on without a connection: {:?}",
                    talk.step
                );
            }
            let unanswered = talk.unanswered;
            given.push(Given {
                says,
                took,
                unanswered,
            });
            let faults = budget.faults - u32::from(fault);
            self.go(talk, given, worlds, Budget { faults, ..budget });
            given.pop();
        }
    }

    /// The same conversation up to here. Machines cannot be cloned.
    fn again(&self, given: &[Given]) -> Talk<T> {
        let mut talk = Talk::start(self);
        for Given { says, took, .. } in given {
            Self::sleep_over(self, &mut talk);
            talk.answer(self, says.answer(), *took);
        }
        Self::sleep_over(self, &mut talk);
        talk
    }

    fn sleep_over(&self, talk: &mut Talk<T>) {
        if let Step::Sleep(duration) = talk.step {
            talk.answer(self, DONE, duration);
        }
    }

    #[track_caller]
    fn all(&self, worlds: &[World], is_fine: impl Fn(&World) -> bool, otherwise: &str) {
        for world in worlds {
            assert!(is_fine(world), "{otherwise}: {world:?}");
        }
    }

    fn sent(&self, talk: &Talk<T>, message: &Message, worlds: &[World]) {
        if message.statements == [Nothing] && !self.strange {
            // A cancel that hits the question aborts no transaction that could go on.
            let is_over =
                |world: &World| world.now.ended || world.now.is_aborted() || !world.now.is_open();
            self.all(worlds, is_over, "asks in a transaction that goes on");
        }
        if !message.asks() {
            return;
        }
        // A transaction that failed is rolled back by what comes first in the message.
        if self.goal != Goal::Begin {
            self.all(
                worlds,
                |world| world.is_as_before(Aborted::Refused),
                "asks again while it may have it",
            );
        }
        let waited = talk.now - millis(5_000);
        if let Some(limit) = message.waits() {
            assert_ne!(limit, 0, "waits without a limit of its own");
            // A millisecond is as good as a try.
            assert!(
                self.wait.poll.is_none() || limit == 1,
                "waits in the queue, while polling"
            );
            let longest = match self.wait.remaining(waited) {
                // The length of a quiet turn was chosen one message before.
                Some(left) => left.as_nanos().div_ceil(1_000_000).max(1) + 1,
                None => u128::from(u32::MAX),
            };
            let limit = u128::from(limit);
            assert!(limit <= longest, "waits {limit} ms, and {longest} are left");
            let noisiest = if message.is_quiet() { 60_000 } else { 900 };
            assert!(limit <= noisiest, "waits too long in one turn: {limit} ms");
        }
    }

    /// `message` is `None` for a sleep.
    fn abandoned(&self, talk: &Talk<T>, message: Option<&Message>, worlds: &[World]) {
        let abandoned = talk.machine.abandon();
        let Abandoned {
            messages,
            broken,
            cancel,
            ..
        } = &abandoned;
        assert!(
            *broken || !cancel,
            "a cancel may hit the user's next statement"
        );
        let waits = message.is_some_and(|message| message.waits().is_some());
        assert!(*broken || !waits, "fit for others while it waits");
        if !self.droppable {
            // It is not abandoned, so it need not know how. But it must do no harm.
            return;
        }
        for text in messages {
            for name in names(text) {
                assert_eq!(Some(&name), talk.own.as_ref(), "another savepoint");
            }
        }
        let parsed = messages.iter();
        let parsed = parsed.map(|text| Message::of_text(text, talk.own.as_deref()));
        let messages: Vec<_> = parsed.collect();
        for world in worlds {
            let unread = match message {
                Some(message) => world.now.receive_unread(message),
                None => vec![world.now.clone()],
            };
            for unread in unread {
                let obeyed = obey(vec![unread.clone()], &messages, None);
                self.all_after(world, &unread, &obeyed, &abandoned);
            }
            // Unless it fails, the lock is free at once, also where the connection stays open for a while, and also if
            // the cancel comes too late and hits one of the messages. (`begin` only rolls back.)
            let Some(message) = message else { continue };
            if self.strange || !matches!(self.goal, Goal::Session { .. }) || messages.is_empty() {
                continue;
            }
            let inside = self.goal == Goal::Session { inside: true };
            let hits = match *cancel && !(inside && message.is_quiet()) {
                true => messages.len(),
                false => 0,
            };
            for hit in std::iter::once(None).chain((0..hits).map(Some)) {
                for now in obey(world.now.obey(message), &messages, hit) {
                    let free = now.holds == world.before.holds || now.ended;
                    assert!(free, "stays held: {abandoned:?} {hit:?} {now:?}");
                }
            }
        }
    }

    fn all_after(&self, world: &World, unread: &Server, after: &[Server], abandoned: &Abandoned) {
        for now in after {
            let world = World {
                now: now.clone(),
                before: world.before.clone(),
            };
            let fine = match (abandoned.broken, self.goal) {
                // The session is ended, and what it holds too much is free then.
                (true, Goal::Release) => now.holds + 1 >= world.before.holds || now.ended,
                (true, _) => now.holds >= world.before.holds || now.ended,
                (false, Goal::Release) => {
                    world.is_released() || world.before.holds == 0 || now.ended
                }
                // What a transaction holds goes with it.
                (false, Goal::Transaction) => now.holds == world.before.holds || now.ended,
                (false, _) => world.is_as_before(Aborted::Allowed),
            };
            assert!(fine, "abandoned: {abandoned:?}\nwas {unread:?}\n{world:?}");
        }
    }

    fn ended(&self, talk: &Talk<T>, result: Result<T, Failure>, worlds: &[World]) {
        let waited = talk.now - millis(5_000);
        let result = result.map(Outcome::end);
        if let Ok(End::Holds(_)) = result {
            let excludes = |world: &World| !world.now.is_on_a_standby();
            self.all(worlds, excludes, "granted on a standby");
        }
        match (result, self.goal) {
            (Ok(End::Holds(hold)), Goal::Session { inside }) => {
                self.all(worlds, |world| world.is_granted(inside), "not granted");
                let hold = ManuallyDrop::new(hold.expect("no hold"));
                (self.acquired)(&hold, worlds);
            }
            (Ok(End::Holds(Some(_))), _) => {
                self.all(worlds, World::is_granted_in_raw_transaction, "not granted");
            }
            (Ok(End::Holds(None)), _) => {
                self.all(worlds, World::is_granted_to_transaction, "not granted");
            }
            (Ok(End::GaveUp), _) => self.gave_up(waited, worlds, Aborted::Refused),
            (Ok(End::Released), _) => self.all(worlds, World::is_released, "not released"),
            (Err(failure), goal) => self.failed(talk, &failure, goal, waited, worlds),
        }
    }

    fn gave_up(&self, waited: Duration, worlds: &[World], aborted: Aborted) {
        let limit = self.wait.limit.expect("there is no limit");
        assert!(waited >= limit, "gave up after {waited:?}");
        self.all(
            worlds,
            |world| world.is_as_before(aborted),
            "leaves something behind",
        );
    }

    fn failed(
        &self,
        talk: &Talk<T>,
        failure: &Failure,
        goal: Goal,
        waited: Duration,
        worlds: &[World],
    ) {
        let lost = worlds.iter().all(|world| world.now.ended);
        match failure.aftermath {
            _ if lost => {
                assert_eq!(failure.aftermath, Aftermath::MarkBroken, "it is gone");
                return;
            }
            Aftermath::EndSession | Aftermath::EndSessionUnread => {
                let aborted = match goal {
                    Goal::Begin | Goal::Session { inside: false } => Aborted::Allowed,
                    // Nobody can ask in a transaction that is aborted.
                    Goal::InRawTransaction => return,
                    _ => Aborted::Refused,
                };
                let known = match goal {
                    Goal::Release => {
                        let is_unchanged = |world: &World| world.now == world.before;
                        worlds.iter().all(World::is_released) || worlds.iter().all(is_unchanged)
                    }
                    _ => worlds.iter().all(|world| world.is_as_before(aborted)),
                };
                // Or the question failed that would have told.
                assert!(
                    !known || talk.unanswered,
                    "ends the session though nothing is left: {failure:?}"
                );
                return;
            }
            Aftermath::MarkBroken => {
                assert_eq!((&failure.reason, goal), (&Reason::NotHeld, Goal::Release));
                let is_free =
                    |world: &World| world.now.holds < world.before.holds || world.before.holds == 0;
                self.all(worlds, is_free, "it is held");
                return;
            }
            Aftermath::Clean => {}
        }
        match &failure.reason {
            Reason::Timeout { waited: told, .. } => {
                assert!(*told <= waited);
                // Who has the lock is asked in the transaction, without a savepoint.
                self.gave_up(*told, worlds, Aborted::Allowed);
            }
            _ => {
                assert_ne!(goal, Goal::Release, "nobody knows: {failure:?}");
                self.all(
                    worlds,
                    |world| world.is_as_before(Aborted::Allowed),
                    "leaves something behind",
                );
            }
        }
    }
}

/// What a session may be after these messages, if a cancel hits one of them.
fn obey(mut sessions: Vec<Server>, messages: &[Message], cancelled: Option<usize>) -> Vec<Server> {
    for (at, message) in messages.iter().enumerate() {
        let after = |session: Server| match cancelled == Some(at) {
            true => vec![session.cancelled()],
            false => session.obey(message),
        };
        sessions = sessions.into_iter().flat_map(after).collect();
    }
    sessions
}

const WAITS: [Wait; 6] = [
    FOREVER,
    TRY,
    limit(millis(100)),
    limit(millis(4_000)),
    poll(None),
    poll(Some(millis(120))),
];

const BUDGET: Budget = Budget { faults: 3, asks: 4 };

fn nothing(_: &Hold<PostgresKey>, _: &[World]) {}

struct Start<'w> {
    goal: Goal,
    droppable: bool,
    others: Vec<String>,
    sessions: Vec<Server>,
    strange: bool,
    acquired: &'w dyn Fn(&Hold<PostgresKey>, &[World]),
    budget: Budget,
}

impl Start<'_> {
    fn walk<T: Outcome>(&self, wait: Wait, machine: &dyn Fn() -> Box<dyn Talks<T>>) -> usize {
        let mut walk = Walk {
            machine,
            goal: self.goal,
            wait,
            droppable: self.droppable,
            others: self.others.clone(),
            strange: self.strange,
            acquired: self.acquired,
            conversations: 0,
        };
        let _together = ALONE.read();
        let worlds = self.sessions.iter().cloned().map(World::new).collect();
        walk.go(Talk::start(&walk), &mut Vec::new(), worlds, self.budget);
        walk.conversations
    }
}

fn walked(wait: Wait, droppable: bool, name_holders: bool) -> &'static Ask {
    leak(Ask {
        wait,
        droppable,
        name_holders,
        tell_holders: name_holders,
        inside_transaction: true,
        ..Ask::new(42.into())
    })
}

fn count(what: &str, conversations: usize) {
    println!("{what}: {conversations} conversations");
    assert!(conversations > 20);
}

/// The ways in which the surroundings of a session may differ, outside a transaction.
fn surroundings() -> Vec<Surroundings> {
    vec![
        USUAL,
        Surroundings {
            plpgsql: false,
            ..USUAL
        },
        Surroundings {
            transaction_timeout: true,
            ..USUAL
        },
        Surroundings {
            statement_timeout: 50,
            ..USUAL
        },
        Surroundings {
            forgotten: true,
            ..USUAL
        },
        Surroundings {
            unnamed: true,
            ..USUAL
        },
        Surroundings {
            standby: true,
            ..USUAL
        },
    ]
}

fn outside() -> Vec<Server> {
    let mut sessions = Vec::new();
    for surroundings in surroundings() {
        for holds in [0, 1] {
            sessions.push(Server::new(surroundings, holds));
            if !surroundings.forgotten {
                sessions.push(Server::new(surroundings, holds).prepared());
            }
        }
    }
    sessions
}

/// Open transactions, also aborted ones. An outer guard has a savepoint.
fn inside() -> Vec<Server> {
    let mut sessions = Vec::new();
    for (plpgsql, standby) in [(true, false), (false, false), (true, true)] {
        let surroundings = Surroundings {
            plpgsql,
            standby,
            ..USUAL
        };
        for open in [
            Server::new(surroundings, 0).open(&[]),
            Server::new(surroundings, 1).open(&["outer"]),
            Server::new(surroundings, 1).open(&[]),
        ] {
            sessions.push(open.clone());
            sessions.push(open.aborted());
        }
    }
    sessions
}

mod acquiring {
    use super::*;

    fn session(inside: bool, droppable: bool, name_holders: bool) {
        let mut sessions = if inside { super::inside() } else { outside() };
        if inside && droppable {
            // A savepoint of that name is left over.
            sessions.push(Server::new(USUAL, 0).open(&["own"]).aborted());
            sessions.push(Server::new(USUAL, 1).open(&["own"]).aborted());
        }
        let depth = if inside { INSIDE } else { OUTSIDE };
        let start = Start {
            goal: Goal::Session { inside },
            droppable,
            others: vec![],
            strange: false,
            sessions,
            acquired: &parts,
            budget: BUDGET,
        };
        let mut conversations = 0;
        for wait in WAITS {
            let ask = walked(wait, droppable, name_holders);
            conversations += start.walk(wait, &|| {
                still_there(Postgres::acquire(ask, depth).unwrap())
            });
        }
        count("session", conversations);
    }

    #[test]
    fn outside_a_transaction() {
        session(false, false, false);
    }

    #[test]
    fn outside_a_transaction_so_that_it_may_be_dropped() {
        session(false, true, false);
    }

    #[test]
    fn outside_a_transaction_and_who_has_it() {
        session(false, true, true);
    }

    #[test]
    fn inside_a_transaction() {
        session(true, false, false);
    }

    #[test]
    fn inside_a_transaction_so_that_it_may_be_dropped() {
        session(true, true, false);
    }

    #[test]
    fn inside_a_transaction_and_who_has_it() {
        session(true, true, true);
    }

    #[test]
    fn for_the_transaction() {
        let start = Start {
            goal: Goal::Transaction,
            droppable: true,
            others: vec![],
            strange: false,
            sessions: inside(),
            acquired: &nothing,
            budget: BUDGET,
        };
        let mut conversations = 0;
        for (wait, name_holders) in WAITS
            .into_iter()
            .flat_map(|wait| [(wait, false), (wait, true)])
        {
            let ask = walked(wait, true, name_holders);
            conversations += start.walk(wait, &|| {
                still_there(Postgres::acquire_in_transaction(ask, INSIDE).unwrap())
            });
        }
        count("transaction", conversations);
    }

    #[test]
    fn with_the_transaction_that_it_begins() {
        let mut sessions = outside();
        sessions.extend(outside().into_iter().map(|session| session.isolated()));
        let start = Start {
            goal: Goal::Begin,
            droppable: true,
            others: vec![],
            strange: false,
            sessions,
            acquired: &nothing,
            budget: BUDGET,
        };
        let mut conversations = 0;
        for (wait, name_holders) in WAITS
            .into_iter()
            .flat_map(|wait| [(wait, false), (wait, true)])
        {
            let ask = walked(wait, true, name_holders);
            conversations += start.walk(wait, &|| still_there(Postgres::begin(ask).unwrap()));
        }
        count("begin", conversations);
    }

    /// A raw BEGIN. An error aborts that transaction, and then nobody can ask.
    #[test]
    fn in_a_transaction_that_the_driver_does_not_know_of() {
        let mut sessions = Vec::new();
        for open in outside().into_iter().map(|session| session.open(&[])) {
            sessions.push(open.clone());
            sessions.push(open.aborted());
        }
        let start = Start {
            goal: Goal::InRawTransaction,
            droppable: false,
            others: vec![],
            strange: false,
            sessions,
            acquired: &nothing,
            budget: BUDGET,
        };
        let mut conversations = 0;
        for wait in WAITS {
            let ask = walked(wait, false, false);
            conversations += start.walk(wait, &|| {
                still_there(Postgres::acquire(ask, OUTSIDE).unwrap())
            });
        }
        count("raw", conversations);
    }

    /// Answers of another kind: the connection is out of step.
    #[test]
    fn with_strange_answers() {
        let budget = Budget { faults: 2, asks: 2 };
        let mut conversations = 0;
        for (wait, droppable) in WAITS
            .into_iter()
            .flat_map(|wait| [(wait, false), (wait, true)])
        {
            let ask = walked(wait, droppable, true);
            let start = |goal, sessions| Start {
                goal,
                droppable,
                others: vec![],
                strange: true,
                sessions,
                acquired: &nothing,
                budget,
            };
            let mut isolated = outside();
            isolated.extend(outside().into_iter().map(Server::isolated));
            conversations += start(Goal::Session { inside: false }, outside()).walk(wait, &|| {
                still_there(Postgres::acquire(ask, OUTSIDE).unwrap())
            });
            conversations += start(Goal::Session { inside: true }, inside()).walk(wait, &|| {
                still_there(Postgres::acquire(ask, INSIDE).unwrap())
            });
            conversations += start(Goal::Transaction, inside()).walk(wait, &|| {
                still_there(Postgres::acquire_in_transaction(ask, INSIDE).unwrap())
            });
            conversations += start(Goal::Begin, isolated)
                .walk(wait, &|| still_there(Postgres::begin(ask).unwrap()));
        }
        count("strange", conversations);
    }
}

/// A hold is given up by somebody who cannot wait, in every state that its session may be in by then.
fn parts(hold: &Hold<PostgresKey>, worlds: &[World]) {
    for World { before, now } in worlds {
        for (session, server) in states(hold, now) {
            let parting = Postgres::part(hold, session);
            let message = parting.message.expect("nothing is sent");
            assert_eq!(parting.request, None);
            let is_aborted = server.is_aborted();
            let message = Message::of_text(&message, None);
            for after in server.obey(&message) {
                let context = format!("{session:?}, {before:?}, {server:?}, {after:?}");
                let is_free = after.holds == before.holds;
                assert!(
                    after.holds >= before.holds,
                    "an outer hold is lost: {context}"
                );
                let known = session.is_some_and(|session| {
                    let in_test = session.test_transaction && hold.depth().is_some();
                    session.depth.is_none() || in_test
                });
                assert_eq!(parting.broken, !known, "{context}");
                if known {
                    let depth = session.and_then(|session| session.depth);
                    assert_eq!(after.is_open(), depth.is_some(), "{context}");
                    assert!(after.settings_are_the_users(), "{context}");
                }
                // In an aborted test transaction, as the docs say, the lock stays.
                assert!(is_free || is_aborted, "it stays held: {context}");
                let rolled_back = hold.depth().is_none();
                assert!(is_free || !rolled_back, "it stays held: {context}");
            }
        }
    }
}

/// What may have become of a session since the lock was acquired, and what the driver knows of it.
fn states(hold: &Hold<PostgresKey>, now: &Server) -> Vec<(Option<Session>, Server)> {
    let mut states = Vec::new();
    let mut aborted_as_well = |session, server: Server| {
        states.push((session, server.clone()));
        states.push((session, server.aborted()));
    };
    match hold.depth() {
        None => {
            aborted_as_well(Some(INSIDE), now.clone().open(&[]));
            aborted_as_well(Some(IN_TEST), now.clone().open(&[]));
            aborted_as_well(Some(at_depth(2)), now.clone().open(&["diesel_savepoint_1"]));
            aborted_as_well(None, now.clone().open(&[]));
            states.push((Some(OUTSIDE), now.clone()));
            states.push((None, now.clone()));
        }
        Some(_) => {
            aborted_as_well(Some(INSIDE), now.clone());
            aborted_as_well(Some(IN_TEST), now.clone());
            aborted_as_well(Some(at_depth(2)), now.clone());
            aborted_as_well(None, now.clone());
            let ended = now.clone().after_transaction();
            states.push((Some(OUTSIDE), ended.clone()));
            states.push((None, ended));
        }
    }
    states
}

mod releasing {
    use super::*;
    use crate::script::{play, value};

    fn hold(droppable: bool, session: Session) -> Hold<PostgresKey> {
        let ask = walked(FOREVER, droppable, false);
        let acquire = fresh(ask, || play(Postgres::acquire(ask, session).unwrap()));
        let acquired = match (session.depth, droppable) {
            (None, _) => acquire.answer(value(1)),
            (Some(_), false) => acquire.answer(DONE),
            (Some(_), true) => acquire.answer(value(0)).answer(DONE),
        };
        acquired.ended().unwrap().unwrap()
    }

    fn release(acquired: Session, released: Session, sessions: &[Server], budget: Budget) {
        let mut conversations = 0;
        for droppable in [false, true] {
            for strange in [false, true] {
                let start = Start {
                    goal: Goal::Release,
                    droppable: true,
                    others: vec![],
                    strange,
                    sessions: sessions.to_vec(),
                    acquired: &nothing,
                    budget,
                };
                conversations += start.walk(FOREVER, &|| {
                    still_there(Postgres::release(hold(droppable, acquired), released))
                });
            }
        }
        count("release", conversations);
    }

    /// The first hold may have been lost; another one is an outer guard's.
    fn outside() -> Vec<Server> {
        let mut sessions = Vec::new();
        for forgotten in [true, false] {
            for holds in [0, 1, 2] {
                let surroundings = Surroundings { forgotten, ..USUAL };
                // It has acquired the lock by a prepared statement.
                sessions.push(Server::new(surroundings, holds).prepared());
            }
        }
        sessions
    }

    #[test]
    fn outside_a_transaction() {
        release(OUTSIDE, OUTSIDE, &outside(), BUDGET);
    }

    /// Where the driver keeps no prepared statements. (After two cancels in a row an outer hold may be taken.)
    #[test]
    fn by_a_statement_that_is_not_kept() {
        let surroundings = Surroundings {
            unnamed: true,
            ..USUAL
        };
        let sessions = [0, 1, 2].map(|holds| Server::new(surroundings, holds));
        let budget = Budget { faults: 1, asks: 4 };
        release(OUTSIDE, OUTSIDE, &sessions, budget);
    }

    #[test]
    fn inside_the_transaction_of_the_acquire() {
        let mut sessions = Vec::new();
        for open in [
            Server::new(USUAL, 0).open(&["own"]),
            Server::new(USUAL, 1).open(&["own"]),
            Server::new(USUAL, 2).open(&["outer", "own"]),
            Server::new(USUAL, 2).open(&["own"]),
        ] {
            sessions.push(open.clone());
            sessions.push(open.aborted());
        }
        release(INSIDE, INSIDE, &sessions, BUDGET);
    }

    #[test]
    fn after_the_transaction_of_the_acquire() {
        release(INSIDE, OUTSIDE, &outside(), BUDGET);
    }
}
