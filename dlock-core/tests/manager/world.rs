//! Processes with managers, a server, the network between them, and a scheduler that is driven by a seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use dlock_core::proto::manager::{
    Action, Config, ConnId, HoldId, How, Identity, Manager, News, Outcome, QuestionId, Ticket,
    Wanted,
};
use dlock_core::proto::{Aftermath, Cause, Failure, Reason};
use dlock_core::{FencingToken, Holder, Mode};

use crate::random::Random;
use crate::server::{Key, Server, Session, Time, slot_key};

pub(crate) const MILLI: Time = 1000;
pub(crate) const SECOND: Time = 1_000_000;

/// What a run is like.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) processes: usize,
    pub(crate) connections: usize,
    pub(crate) tasks: usize,
    pub(crate) first_key: u64,
    pub(crate) keys: u64,
    pub(crate) rounds: u32,
    pub(crate) lease: Time,
    pub(crate) longest_wait: Option<Time>,
    pub(crate) turns: u32,
    /// Every second key is a semaphore with so many permits, which some requests do not know of; 0: none.
    pub(crate) permits: u32,
    /// One in so many requests is for several locks; 0: none.
    pub(crate) several: u64,
    /// Requests are exclusive only.
    pub(crate) exclusive: bool,
    /// The longest that a holder works, usually.
    pub(crate) work: Time,
    /// One in so many holders works up to two leases; 0: none.
    pub(crate) long: u64,
    /// One in so many messages takes up to 0.3 seconds; 0: none.
    pub(crate) slow: u64,
    /// One in so many messages breaks its connection; 0: none.
    pub(crate) broken: u64,
    /// One in so many messages is the last that comes through, and nobody notices; 0: none.
    pub(crate) silent: u64,
    /// One in so many messages ends the session at the server; 0: none.
    pub(crate) killed: u64,
    /// One in so many connections cannot be opened; 0: none.
    pub(crate) refused: u64,
    /// One in so many waits is dropped; 0: none.
    pub(crate) dropped: u64,
    /// One in so many requests has a limit; 0: none.
    pub(crate) limited: u64,
    /// The managers are closed at the end of the time, whoever waits.
    pub(crate) closed_at: Option<Time>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Start {
        process: usize,
        task: usize,
    },
    Drop {
        process: usize,
        task: usize,
        round: u32,
    },
    Finish {
        process: usize,
        task: usize,
        round: u32,
    },
    /// A holder wants a fencing token.
    Draw {
        process: usize,
        task: usize,
        round: u32,
    },
    Tick {
        process: usize,
    },
    Opened {
        process: usize,
        conn: u64,
        ok: bool,
    },
    Closed {
        process: usize,
        conn: u64,
    },
    /// A message of the client arrives at the server.
    Arrives {
        session: Session,
        number: u64,
    },
    /// An answer arrives at the client.
    Answer {
        session: Session,
        number: u64,
        answer: Said,
    },
    /// The limit of a wait passes at the server.
    Limit {
        session: Session,
        number: u64,
    },
    /// The client learns that its connection is gone.
    Lost {
        session: Session,
    },
    /// The server learns that the client is gone.
    Gone {
        session: Session,
    },
    Idle {
        session: Session,
    },
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Said {
    Yes,
    No,
    Error,
    Token(u64),
    Slot(u32),
}

#[derive(Clone, Debug)]
enum Statement {
    Acquire {
        key: Key,
        mode: Mode,
        limit: Option<Time>,
    },
    TakeSlot {
        key: Key,
        permits: u32,
        except: Vec<u32>,
        limit: Option<Time>,
    },
    Release {
        key: Key,
        mode: Mode,
    },
    DrawToken {
        key: Key,
    },
    KeepAlive,
}

/// A connection of a client.
struct Client {
    process: usize,
    conn: ConnId,
    /// The client uses it.
    open: bool,
    /// Nothing comes through any more.
    cut: bool,
    number: u64,
    statement: Option<Statement>,
    hold: Option<HoldId>,
    /// Of a wait without a limit: when it gives up, in turns.
    give_up_at: Option<Time>,
    /// It wants to know who has the lock then.
    name_holders: bool,
    waiting: bool,
    /// When somebody ended the session. The client cannot know it before it asks.
    killed_at: Option<Time>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum TaskState {
    Away,
    Waiting {
        ticket: Ticket,
        since: Time,
        until: Option<Time>,
    },
    Holding {
        ticket: Ticket,
    },
    Releasing {
        ticket: Ticket,
    },
}

struct Task {
    state: TaskState,
    key: Key,
    /// What it holds: the locks, or the lock of the slot.
    locks: Vec<Key>,
    permits: Option<u32>,
    mode: Mode,
    round: u32,
    /// The locks that it has given back, and their sessions.
    released: Vec<(Key, Session)>,
}

struct Process {
    manager: Manager,
    tasks: Vec<Task>,
    by_ticket: HashMap<Ticket, usize>,
    /// These have heard who has the lock.
    told: HashSet<Ticket>,
    /// Who wants a token.
    questions: HashMap<QuestionId, Ticket>,
    conns: BTreeMap<u64, Option<Session>>,
    ids: Vec<ConnId>,
    hold_keys: HashMap<HoldId, (Key, Mode, Session)>,
    /// How often each hold was granted to a task, and when first.
    served: HashMap<HoldId, (u32, Time)>,
    tick_at: Option<Time>,
    /// How fast its clock is, in parts of a million.
    rate: u64,
    closed: bool,
    pub(crate) turns: u64,
}

/// The state of everything.
pub(crate) struct World {
    plan: Plan,
    random: Random,
    now: Time,
    events: BinaryHeap<Reverse<(Time, u64, Event)>>,
    next: u64,
    server: Server,
    clients: Vec<Client>,
    processes: Vec<Process>,
    /// Who believes to hold each lock.
    believed: HashMap<Key, Vec<(usize, usize)>>,
    /// Who waits in each process for each lock, and since when. Tries do not wait.
    waiting: HashMap<(usize, Key), BTreeSet<(Time, usize)>>,
    /// What was told to be released in this step.
    released: Vec<(usize, Key, Session)>,
    /// The last token that the server gave, and the greatest that a holder of each lock was told.
    token: u64,
    tokens: HashMap<Key, u64>,
    trace: bool,
    pub(crate) steps: u64,
    pub(crate) longest_wait: Time,
    pub(crate) most_connections: usize,
    pub(crate) losses: u64,
    pub(crate) most_inside: usize,
    pub(crate) grants: u64,
    pub(crate) drawn: u64,
    /// Whether the managers tell who has a lock, and how often they did.
    tells: bool,
    pub(crate) told: u64,
}

impl World {
    pub(crate) fn new(seed: u64, plan: Plan) -> Self {
        let mut random = Random(seed);
        let config = Config {
            connections: plan.connections,
            lease: Some(Duration::from_micros(plan.lease)),
            longest_wait: plan.longest_wait.map(Duration::from_micros),
            turns: plan.turns,
            turn: Config::TURN,
            tells_after: (seed % 2 == 0).then_some(Duration::from_secs(1)),
        };
        let processes = (0..plan.processes)
            .map(|_| Process {
                manager: Manager::new(config),
                tasks: (0..plan.tasks)
                    .map(|_| Task {
                        state: TaskState::Away,
                        key: 0,
                        locks: Vec::new(),
                        permits: None,
                        mode: Mode::Exclusive,
                        round: 0,
                        released: Vec::new(),
                    })
                    .collect(),
                by_ticket: HashMap::new(),
                told: HashSet::new(),
                questions: HashMap::new(),
                conns: BTreeMap::new(),
                ids: Vec::new(),
                hold_keys: HashMap::new(),
                served: HashMap::new(),
                tick_at: None,
                rate: random.range(910_000, 1_090_000),
                closed: false,
                turns: 0,
            })
            .collect();
        let mut world = Self {
            random,
            now: 0,
            events: BinaryHeap::new(),
            next: 0,
            server: Server::default(),
            clients: Vec::new(),
            processes,
            believed: HashMap::new(),
            waiting: HashMap::new(),
            released: Vec::new(),
            token: 0,
            tokens: HashMap::new(),
            trace: std::env::var_os("DLOCK_TRACE").is_some(),
            steps: 0,
            longest_wait: 0,
            most_connections: 0,
            losses: 0,
            most_inside: 0,
            grants: 0,
            tells: config.tells_after.is_some(),
            told: 0,
            drawn: 0,
            plan,
        };
        for process in 0..world.plan.processes {
            for task in 0..world.plan.tasks {
                let delay = world.random.range(0, 20 * MILLI);
                world.later(delay, Event::Start { process, task });
            }
        }
        if let Some(at) = world.plan.closed_at {
            world.later(at, Event::Close);
        }
        world
    }

    fn later(&mut self, delay: Time, event: Event) {
        self.next += 1;
        self.events
            .push(Reverse((self.now + delay, self.next, event)));
    }

    fn clock(&self, process: usize) -> Duration {
        Duration::from_micros(self.now * self.processes[process].rate / 1_000_000)
    }

    /// How long a message takes.
    fn delay(&mut self) -> Time {
        if self.random.one_in(self.plan.slow) {
            return self.random.range(1, 300) * MILLI;
        }
        self.random.range(50, 400)
    }

    /// Runs until all tasks are done and all that is left is gone, or until `end`.
    pub(crate) fn run(&mut self, end: Time) {
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            if at > end {
                break;
            }
            self.now = at;
            self.steps += 1;
            if self.trace {
                eprintln!("{} {event:?}", self.now);
            }
            self.step(event);
            self.check();
        }
        if self.plan.closed_at.is_none() && end == Time::MAX {
            for process in &self.processes {
                assert!(process.questions.is_empty(), "a question was forgotten");
                for task in &process.tasks {
                    assert!(
                        task.state == TaskState::Away && task.round == self.plan.rounds,
                        "a request was forgotten: {:?} of key {} in round {}; {:?}",
                        task.state,
                        task.key,
                        task.round,
                        process.manager,
                    );
                }
            }
        }
        if end == Time::MAX {
            assert!(
                self.server.is_clean(),
                "nobody owns {}",
                self.server.locks()
            );
            assert!(
                self.server.sessions.iter().all(|session| !session.alive),
                "a session is left"
            );
        }
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Start { process, task } => self.start(process, task),
            Event::Drop {
                process,
                task,
                round,
            } => {
                let TaskState::Waiting { ticket, .. } = self.processes[process].tasks[task].state
                else {
                    return;
                };
                if self.processes[process].tasks[task].round == round {
                    let now = self.clock(process);
                    self.processes[process].manager.cancel(ticket, now);
                    self.away(process, task);
                    self.act(process);
                }
            }
            Event::Finish {
                process,
                task,
                round,
            } => self.finish(process, task, round),
            Event::Draw {
                process,
                task,
                round,
            } => {
                let it = &self.processes[process];
                if let TaskState::Holding { ticket } = it.tasks[task].state {
                    if it.tasks[task].round == round {
                        let now = self.clock(process);
                        let it = &mut self.processes[process];
                        let question = it.manager.draw_token(ticket, now);
                        it.questions.insert(question, ticket);
                        self.act(process);
                    }
                }
            }
            Event::Tick { process } => {
                self.processes[process].tick_at = None;
                let now = self.clock(process);
                self.processes[process].manager.tick(now);
                self.act(process);
            }
            Event::Opened { process, conn, ok } => self.opened(process, conn, ok),
            Event::Closed { process, conn } => {
                let id = self.processes[process].ids[conn as usize];
                let now = self.clock(process);
                self.processes[process].manager.closed(id, now);
                self.act(process);
            }
            Event::Arrives { session, number } => self.arrives(session, number),
            Event::Answer {
                session,
                number,
                answer,
            } => self.answer(session, number, answer),
            Event::Limit { session, number } => {
                let client = &self.clients[session];
                if client.number == number && client.waiting {
                    let (waited, woken) = self.server.give_up(session);
                    if waited {
                        self.clients[session].waiting = false;
                        self.say(session, Said::No);
                    }
                    self.granted(woken);
                }
            }
            Event::Lost { session } => {
                if self.clients[session].open {
                    self.lost(session);
                }
            }
            Event::Gone { session } => self.kill(session),
            Event::Idle { session } => {
                let since = self.server.sessions[session].idle_since;
                if since.is_some_and(|since| since + self.plan.lease <= self.now) {
                    self.end_session(session);
                }
            }
            Event::Close => {
                for process in 0..self.plan.processes {
                    let now = self.clock(process);
                    self.processes[process].manager.close(now);
                    self.act(process);
                }
            }
        }
    }

    fn start(&mut self, process: usize, task: usize) {
        let exclusive = self.plan.exclusive || self.random.one_in(2);
        let first = self.plan.first_key;
        let key = self.random.range(first, first + self.plan.keys);
        let permits = match self.plan.permits {
            permits if permits > 0 && key % 2 == 1 => {
                Some(match permits < 10 && self.random.one_in(8) {
                    true => self.random.range(1, u64::from(permits) + 1) as u32,
                    false => permits,
                })
            }
            _ => None,
        };
        let mode = if exclusive || permits.is_some() {
            Mode::Exclusive
        } else {
            Mode::Shared
        };
        let limit = match self.random.one_in(self.plan.limited) {
            true if self.random.one_in(3) => Some(0),
            true => Some(self.random.range(1, 1000) * MILLI),
            false => None,
        };
        let mut keys = vec![key];
        if permits.is_none() && self.random.one_in(self.plan.several) {
            for _ in 0..3 {
                let another = self.random.range(first, first + self.plan.keys);
                let lock = self.plan.permits == 0 || another % 2 == 0;
                keys.extend(lock.then_some(another));
            }
            keys.sort_unstable();
            keys.dedup();
        }
        let now = self.clock(process);
        let it = &mut self.processes[process];
        let wanted = |key: Key| {
            let mut identity = Identity::Number(key as i64);
            if permits.is_some() {
                identity = Identity::Semaphore(Box::new(identity));
            }
            let key = (key as i64).into();
            (identity, Arc::new(Wanted { key, mode, permits }))
        };
        let wait = limit.map(Duration::from_micros);
        let ticket = match &keys[..] {
            [key] => {
                let (identity, what) = wanted(*key);
                it.manager.request(identity, what, wait, now)
            }
            keys => {
                let all = keys.iter().map(|key| wanted(*key)).collect();
                it.manager.request_all(all, wait, now)
            }
        };
        let alone = keys.len() == 1;
        it.by_ticket.insert(ticket, task);
        it.tasks[task].key = keys[0];
        it.tasks[task].locks = keys;
        it.tasks[task].permits = permits;
        it.tasks[task].mode = mode;
        // A try is on its way until it is known that nothing comes through.
        let until = limit.map(|limit| match limit {
            0 => self.now + 3 * self.plan.lease + 6 * SECOND,
            limit => self.now + limit,
        });
        it.tasks[task].state = TaskState::Waiting {
            ticket,
            since: self.now,
            until,
        };
        let round = it.tasks[task].round;
        if limit != Some(0) && alone {
            let since = (self.now, task);
            self.waiting
                .entry((process, key))
                .or_default()
                .insert(since);
        }
        if self.random.one_in(self.plan.dropped) {
            let delay = self.random.range(0, 500 * MILLI);
            self.later(
                delay,
                Event::Drop {
                    process,
                    task,
                    round,
                },
            );
        }
        self.act(process);
    }

    /// A task waits and holds no longer.
    fn leaves(&mut self, process: usize, task: usize) {
        let it = &self.processes[process].tasks[task];
        match it.state {
            TaskState::Waiting { since, .. } => {
                if let Some(waiting) = self.waiting.get_mut(&(process, it.key)) {
                    waiting.remove(&(since, task));
                }
            }
            TaskState::Holding { .. } => {
                for lock in &it.locks {
                    if let Some(believed) = self.believed.get_mut(lock) {
                        believed.retain(|holder| *holder != (process, task));
                    }
                }
            }
            _ => {}
        }
    }

    /// A task has what it wanted, or not.
    fn away(&mut self, process: usize, task: usize) {
        self.leaves(process, task);
        let it = &mut self.processes[process].tasks[task];
        it.state = TaskState::Away;
        it.round += 1;
        if it.round < self.plan.rounds {
            let delay = match self.random.one_in(10) {
                true => self.random.range(0, SECOND),
                false => self.random.range(0, 2 * MILLI),
            };
            self.later(delay, Event::Start { process, task });
        }
    }

    fn finish(&mut self, process: usize, task: usize, round: u32) {
        let it = &mut self.processes[process];
        let TaskState::Holding { ticket } = it.tasks[task].state else {
            return;
        };
        if it.tasks[task].round != round {
            return;
        }
        let now = self.clock(process);
        let forgets = self.random.one_in(2);
        let it = &mut self.processes[process];
        let manager = &mut it.manager;
        it.questions.retain(|question, of| {
            let forgotten = forgets && *of == ticket;
            if forgotten {
                manager.forget(*question);
            }
            !forgotten
        });
        if self.random.one_in(5) {
            it.manager.cancel(ticket, now);
            self.away(process, task);
        } else {
            let holds = it.manager.holds_of(ticket).into_iter();
            let sessions = holds.map(|(_, hold)| it.hold_keys[&hold]);
            let released = sessions.map(|(key, _, session)| (key, session)).collect();
            // If it is lost already, its loss is told in the same moment.
            if it.manager.release(ticket, now) {
                self.leaves(process, task);
                self.processes[process].tasks[task].state = TaskState::Releasing { ticket };
                self.processes[process].tasks[task].released = released;
            }
        }
        self.act(process);
    }

    /// Does what a manager wants.
    fn act(&mut self, process: usize) {
        while let Some(action) = self.processes[process].manager.poll() {
            if self.trace {
                eprintln!("{} {process}: {action:?}", self.now);
            }
            match action {
                Action::Open(conn) => {
                    let it = &mut self.processes[process];
                    let number = it.ids.len() as u64;
                    it.ids.push(conn);
                    it.conns.insert(number, None);
                    self.most_connections = self.most_connections.max(it.conns.len());
                    let ok = !self.random.one_in(self.plan.refused);
                    let delay = 5 * self.delay();
                    self.later(
                        delay,
                        Event::Opened {
                            process,
                            conn: number,
                            ok,
                        },
                    );
                }
                Action::Acquire {
                    conn,
                    hold,
                    what,
                    how,
                } => {
                    let How {
                        limit,
                        except,
                        name_holders,
                        ..
                    } = how;
                    let key = key_of(&what);
                    let session = self.session(process, conn);
                    // The server would grant it once more, whoever waits.
                    let holds = match what.permits {
                        None => self.server.holds(session, key),
                        Some(_) => self.server.slots_of(session, key) != sorted(&except),
                    };
                    let killed = self.clients[session].killed_at.is_some();
                    assert!(!holds || killed, "a session is asked for what it holds");
                    self.clients[session].hold = Some(hold);
                    let it = &mut self.processes[process];
                    it.hold_keys.insert(hold, (key, what.mode, session));
                    let limit = limit.map(|limit| limit.as_micros() as Time);
                    self.clients[session].give_up_at = limit.map(|limit| self.now + limit);
                    self.clients[session].name_holders = name_holders;
                    self.ask(
                        session,
                        key,
                        what.mode,
                        what.permits.map(|permits| (permits, except)),
                    );
                }
                Action::Release { conn, hold } => {
                    let session = self.session(process, conn);
                    let (key, mode, of) = self.processes[process].hold_keys[&hold];
                    assert_eq!(of, session, "a hold is released on another connection");
                    self.processes[process].hold_keys.remove(&hold);
                    self.send(session, Statement::Release { key, mode });
                }
                Action::DrawToken { conn, hold } => {
                    let session = self.session(process, conn);
                    let (key, _, of) = self.processes[process].hold_keys[&hold];
                    assert_eq!(of, session, "a token is drawn on another connection");
                    self.send(session, Statement::DrawToken { key });
                }
                Action::KeepAlive(conn) => {
                    let session = self.session(process, conn);
                    self.send(session, Statement::KeepAlive);
                }
                Action::Close(conn) => {
                    let number = self.number(process, conn);
                    if let Some(Some(session)) = self.processes[process].conns.remove(&number) {
                        self.shut(session);
                    }
                    let delay = self.delay();
                    self.later(
                        delay,
                        Event::Closed {
                            process,
                            conn: number,
                        },
                    );
                }
                Action::Tell(ticket, news) => self.tell(process, ticket, news),
                Action::TellHolders(ticket, holders) => {
                    assert!(holders[0].granted && self.tells, "nobody wants to know");
                    let it = &mut self.processes[process];
                    assert!(it.told.insert(ticket), "it was told before");
                    let task = it.by_ticket.get(&ticket);
                    let state = task.map(|task| &it.tasks[*task].state);
                    assert!(
                        matches!(state, Some(TaskState::Waiting { .. })),
                        "it does not wait"
                    );
                    self.told += 1;
                }
                Action::Answer(question, answer) => self.answered(process, question, answer),
                Action::Closed => {
                    assert!(self.processes[process].conns.is_empty(), "closed too early");
                    self.processes[process].closed = true;
                }
            }
        }
        if let Some(at) = self.processes[process].manager.next_tick() {
            let at = at.as_micros() as Time * 1_000_000 / self.processes[process].rate + 1;
            if self.processes[process].tick_at.is_none_or(|tick| at < tick) {
                self.processes[process].tick_at = Some(at);
                let late = self.random.range(0, 20 * MILLI);
                let delay = at.saturating_sub(self.now) + late;
                self.later(delay, Event::Tick { process });
            }
        }
    }

    fn number(&self, process: usize, conn: ConnId) -> u64 {
        let ids = &self.processes[process].ids;
        ids.iter()
            .rposition(|id| *id == conn)
            .expect("a connection") as u64
    }

    fn session(&self, process: usize, conn: ConnId) -> Session {
        let number = self.number(process, conn);
        let session = self.processes[process]
            .conns
            .get(&number)
            .copied()
            .flatten();
        session.expect("a conversation on a connection that is not open")
    }

    fn tell(&mut self, process: usize, ticket: Ticket, news: News) {
        let it = &mut self.processes[process];
        let task = it.by_ticket[&ticket];
        let round = it.tasks[task].round;
        if !matches!(news, News::Granted { .. }) {
            it.by_ticket.remove(&ticket);
        }
        if let News::Granted { slot: Some(slot) } = news {
            let it = &mut it.tasks[task];
            assert!(
                it.permits.is_some_and(|permits| slot < permits),
                "a wrong slot"
            );
            it.locks = vec![slot_key(it.key, slot)];
        }
        let alone = it.tasks[task].locks.len() == 1;
        let (locks, state) = (it.tasks[task].locks.clone(), it.tasks[task].state);
        match (state, news) {
            (
                TaskState::Waiting {
                    ticket: t, since, ..
                },
                News::Granted { .. },
            ) if t == ticket => {
                self.check_grant(process, task, ticket);
                self.leaves(process, task);
                for key in locks {
                    self.believed.entry(key).or_default().push((process, task));
                }
                if self.plan.keys == 1 {
                    let inside = self.believed.values().map(Vec::len).sum();
                    self.most_inside = self.most_inside.max(inside);
                }
                self.grants += 1;
                let it = &mut self.processes[process];
                it.turns += 1;
                it.tasks[task].state = TaskState::Holding { ticket };
                self.longest_wait = self.longest_wait.max(self.now - since);
                let holds = it.manager.holds_of(ticket);
                assert_eq!(
                    holds.len(),
                    it.tasks[task].locks.len(),
                    "all of several locks"
                );
                let (conn, hold) = holds[0];
                let served = it.served.entry(hold).or_insert((0, self.now));
                // Several locks may have moved to another hold before they were told.
                served.0 += u32::from(alone);
                let (times, first) = *served;
                let late = self.now > first + Config::TURN.as_micros() as Time * 11 / 10;
                // Several locks are told after the last of them was granted.
                if alone && (times > self.plan.turns || times > 1 && late) {
                    self.check_that_no_other_can_ask(process, conn, task);
                }
                let work = match self.random.one_in(self.plan.long) {
                    true => self.random.range(0, 2 * self.plan.lease),
                    false => self.random.range(0, self.plan.work.max(1)),
                };
                for _ in 0..3 {
                    if self.random.one_in(12) {
                        let at = self.random.range(0, work.max(1));
                        let draw = Event::Draw {
                            process,
                            task,
                            round,
                        };
                        self.later(at, draw);
                    }
                }
                self.later(
                    work,
                    Event::Finish {
                        process,
                        task,
                        round,
                    },
                );
            }
            (
                TaskState::Waiting {
                    ticket: t, since, ..
                },
                News::Taken { .. },
            ) if t == ticket => {
                self.longest_wait = self.longest_wait.max(self.now - since);
                self.away(process, task);
            }
            (TaskState::Waiting { ticket: t, .. }, News::Failed(_) | News::Closed)
                if t == ticket =>
            {
                self.away(process, task);
            }
            (TaskState::Holding { ticket: t }, News::Lost) if t == ticket => {
                self.losses += 1;
                self.away(process, task);
            }
            (TaskState::Releasing { ticket: t }, News::Released | News::NotReleased(_))
                if t == ticket =>
            {
                let released = std::mem::take(&mut it.tasks[task].released);
                // Of several locks, the first may be another's before the last is released.
                let released = released.into_iter().filter(|_| alone);
                self.released
                    .extend(released.map(|(key, session)| (process, key, session)));
                self.away(process, task);
            }
            // Told in the call that released it.
            (TaskState::Releasing { ticket: t }, News::Lost) if t == ticket => {
                panic!("lost after its release")
            }
            (state, news) => panic!("{news:?} came to a task that is {state:?}"),
        }
    }

    /// A holder is told a token, or that it has lost the lock.
    fn answered(
        &mut self,
        process: usize,
        question: QuestionId,
        answer: Result<FencingToken, Failure>,
    ) {
        let it = &mut self.processes[process];
        let ticket = it
            .questions
            .remove(&question)
            .expect("a question that was asked once");
        let task = it.by_ticket.get(&ticket).map(|task| &it.tasks[*task]);
        let holds = it.manager.holds_of(ticket);
        let Some((task, hold)) = task.zip(holds.first()) else {
            return;
        };
        if task.state != (TaskState::Holding { ticket }) {
            return;
        }
        let (key, _, session) = it.hold_keys[&hold.1];
        let killed = self.clients[session].killed_at.is_some();
        let token = match answer {
            Ok(token) => i64::from(token) as u64,
            Err(failure) => {
                assert!(
                    killed,
                    "a holder is told {failure:?}, and was not told the loss"
                );
                return;
            }
        };
        self.drawn += 1;
        let last = self.tokens.entry(key).or_default();
        let rises = token > *last;
        assert!(
            rises || killed || task.mode == Mode::Shared,
            "an earlier holder of {key} has a greater token"
        );
        *last = token.max(*last);
    }

    /// Readers may share a hold without limits where no connection is left to ask for another one.
    fn check_that_no_other_can_ask(&self, process: usize, conn: ConnId, task: usize) {
        let it = &self.processes[process];
        let number = self.number(process, conn);
        let all_wait = it.conns.iter().all(|(other, session)| {
            *other == number
                || session.is_some_and(|session| {
                    self.clients[session].give_up_at != Some(0)
                        && self.clients[session].hold.is_some()
                })
        });
        let full = it.conns.len() == self.plan.connections;
        assert!(
            it.tasks[task].mode == Mode::Shared && all_wait && full,
            "a hold served too many requests"
        );
    }

    fn opened(&mut self, process: usize, number: u64, ok: bool) {
        let now = self.clock(process);
        let id = self.processes[process].ids[number as usize];
        if !self.processes[process].conns.contains_key(&number) {
            return;
        }
        if !ok {
            self.processes[process].conns.remove(&number);
            let failure = Failure {
                key: None,
                reason: Reason::Database,
                aftermath: Aftermath::Clean,
                cause: Cause::default(),
            };
            self.processes[process]
                .manager
                .open_failed(id, failure, now);
            return self.act(process);
        }
        let session = self.server.connect(self.now);
        self.clients.push(Client {
            process,
            conn: id,
            open: true,
            cut: false,
            number: 0,
            statement: None,
            hold: None,
            give_up_at: None,
            name_holders: false,
            waiting: false,
            killed_at: None,
        });
        let lease = self.plan.lease;
        self.later(lease, Event::Idle { session });
        self.processes[process].conns.insert(number, Some(session));
        self.processes[process].manager.opened(id, now);
        self.act(process);
    }

    /// One statement of a conversation that acquires. Without a limit it waits in turns.
    fn ask(&mut self, session: Session, key: Key, mode: Mode, slots: Option<(u32, Vec<u32>)>) {
        const TURN: Time = 900 * MILLI;
        let rest = self.clients[session]
            .give_up_at
            .map(|at| at.saturating_sub(self.now));
        let limit = match self.plan.longest_wait {
            None => Some(rest.map_or(TURN, |rest| rest.min(TURN))),
            Some(_) => rest,
        };
        let statement = match slots {
            None => Statement::Acquire { key, mode, limit },
            Some((permits, except)) => Statement::TakeSlot {
                key,
                permits,
                except,
                limit,
            },
        };
        self.send(session, statement);
    }

    fn send(&mut self, session: Session, statement: Statement) {
        let client = &mut self.clients[session];
        assert!(client.statement.is_none(), "two conversations at once");
        client.number += 1;
        client.statement = Some(statement);
        let (process, conn, number) = (client.process, client.conn, client.number);
        let now = self.clock(process);
        self.processes[process].manager.sent(conn, now);
        if self.random.one_in(self.plan.silent) {
            // Perhaps this message comes through, but no answer.
            let delay = self.delay();
            if self.random.one_in(2) {
                self.later(delay, Event::Arrives { session, number });
            }
            self.clients[session].cut = true;
            return;
        }
        if self.random.one_in(self.plan.killed) {
            self.kill(session);
        }
        if self.random.one_in(self.plan.broken) {
            let (client, server) = (self.delay(), self.delay() * self.random.range(1, 20));
            self.later(client, Event::Lost { session });
            self.later(server, Event::Gone { session });
            if self.random.one_in(2) {
                return;
            }
        }
        let delay = self.delay();
        self.later(delay, Event::Arrives { session, number });
    }

    fn arrives(&mut self, session: Session, number: u64) {
        if self.clients[session].number != number {
            return;
        }
        if !self.server.sessions[session].alive {
            let delay = self.delay();
            return self.later(delay, Event::Lost { session });
        }
        self.server.begins(session);
        match self.clients[session]
            .statement
            .clone()
            .expect("a statement")
        {
            Statement::Acquire { key, mode, limit } => {
                let waits = limit != Some(0);
                if self.server.ask(session, key, mode, waits) {
                    self.say(session, Said::Yes);
                } else if waits {
                    self.clients[session].waiting = true;
                    if let Some(limit) = limit {
                        self.later(limit, Event::Limit { session, number });
                    }
                } else {
                    self.say(session, Said::No);
                }
            }
            Statement::TakeSlot {
                key,
                permits,
                except,
                limit,
            } => {
                let waits = limit != Some(0);
                let granted = self.server.ask_slot(session, key, permits, &except, waits);
                match (granted, limit) {
                    (Some(slot), _) => self.say(session, Said::Slot(slot)),
                    (None, Some(0)) => self.say(session, Said::No),
                    (None, limit) => {
                        self.clients[session].waiting = true;
                        if let Some(limit) = limit {
                            self.later(limit, Event::Limit { session, number });
                        }
                    }
                }
            }
            Statement::Release { key, mode } => {
                let (held, woken) = self.server.release(session, key, mode);
                self.say(session, if held { Said::Yes } else { Said::Error });
                self.granted(woken);
            }
            Statement::DrawToken { key } => {
                self.token += 1;
                let held = self.server.holds(session, key);
                self.say(
                    session,
                    if held {
                        Said::Token(self.token)
                    } else {
                        Said::Error
                    },
                );
            }
            Statement::KeepAlive => self.say(session, Said::Yes),
        }
    }

    /// The server answers.
    fn say(&mut self, session: Session, answer: Said) {
        self.server.ends(session, self.now);
        let lease = self.plan.lease;
        self.later(lease, Event::Idle { session });
        if !self.clients[session].cut {
            let number = self.clients[session].number;
            let delay = self.delay();
            self.later(
                delay,
                Event::Answer {
                    session,
                    number,
                    answer,
                },
            );
        }
    }

    fn granted(&mut self, sessions: Vec<Session>) {
        for session in sessions {
            self.clients[session].waiting = false;
            let slot = self.server.sessions[session].slot.take();
            self.say(session, slot.map_or(Said::Yes, Said::Slot));
        }
    }

    fn answer(&mut self, session: Session, number: u64, answer: Said) {
        let client = &mut self.clients[session];
        if !client.open || client.number != number {
            return;
        }
        let (process, conn) = (client.process, client.conn);
        let statement = client.statement.take().expect("a statement");
        self.processes[process].manager.answered(conn);
        let outcome = match (statement, answer) {
            (Statement::Acquire { .. }, Said::Yes) => Outcome::Granted { slot: None },
            (Statement::TakeSlot { key, .. }, Said::Slot(slot)) => {
                let hold = self.clients[session].hold.expect("a hold");
                let lock = (slot_key(key, slot), Mode::Exclusive, session);
                self.processes[process].hold_keys.insert(hold, lock);
                Outcome::Granted { slot: Some(slot) }
            }
            (asked @ (Statement::Acquire { .. } | Statement::TakeSlot { .. }), _) => {
                let over = self.clients[session]
                    .give_up_at
                    .is_some_and(|at| at <= self.now);
                if self.plan.longest_wait.is_none() && !over {
                    return match asked {
                        Statement::Acquire { key, mode, .. } => self.ask(session, key, mode, None),
                        Statement::TakeSlot {
                            key,
                            permits,
                            except,
                            ..
                        } => self.ask(session, key, Mode::Exclusive, Some((permits, except))),
                        _ => unreachable!(),
                    };
                }
                let asked = over && self.clients[session].name_holders;
                // It may have no right to know it, or the holder has just gone.
                let granted = i64::from(!self.random.one_in(4));
                let holder = Holder::from_columns(7, None, None, 1, granted, None);
                let holders = match asked && !self.random.one_in(4) {
                    true => vec![holder],
                    false => Vec::new(),
                };
                Outcome::Taken { holders }
            }
            (Statement::Release { .. }, Said::Yes) => Outcome::Released,
            (Statement::Release { .. }, _) => {
                panic!("a lock was released that was not held")
            }
            (Statement::DrawToken { .. }, Said::Token(token)) => {
                Outcome::Drawn((token as i64).into())
            }
            (Statement::DrawToken { .. }, _) => panic!("a token of a lock that is not held"),
            (Statement::KeepAlive, _) => Outcome::Alive,
        };
        self.clients[session].hold = None;
        self.clients[session].give_up_at = None;
        let now = self.clock(process);
        self.processes[process].manager.done(conn, outcome, now);
        self.act(process);
        self.check_session(session);
    }

    /// The client closes a connection. The server notices later, and not at all if nothing comes through.
    fn shut(&mut self, session: Session) {
        self.clients[session].open = false;
        if !self.clients[session].cut {
            let delay = self.delay();
            self.later(delay, Event::Gone { session });
        }
    }

    /// The client learns that the connection is gone.
    fn lost(&mut self, session: Session) {
        self.shut(session);
        let (process, conn) = (self.clients[session].process, self.clients[session].conn);
        let number = self.number(process, conn);
        self.processes[process].conns.remove(&number);
        let failure = Failure {
            key: None,
            reason: Reason::Lost,
            aftermath: Aftermath::MarkBroken,
            cause: Cause::default(),
        };
        let now = self.clock(process);
        match self.random.one_in(2) {
            true => self.processes[process].manager.lost(conn, failure, now),
            false => {
                let failed = Outcome::Failed(failure.clone());
                self.processes[process].manager.done(conn, failed, now);
                self.processes[process].manager.lost(conn, failure, now);
            }
        }
        self.act(process);
    }

    /// Ends a session before its limit.
    fn kill(&mut self, session: Session) {
        self.clients[session].killed_at.get_or_insert(self.now);
        self.end_session(session);
    }

    fn end_session(&mut self, session: Session) {
        if self.server.sessions[session].alive {
            self.clients[session].waiting = false;
            let woken = self.server.end(session);
            self.granted(woken);
        }
    }

    /// A task believes that it holds a lock from now on.
    fn check_grant(&self, process: usize, task: usize, ticket: Ticket) {
        let it = &self.processes[process].tasks[task];
        for (_, hold) in self.processes[process].manager.holds_of(ticket) {
            let (key, _, own) = self.processes[process].hold_keys[&hold];
            if self.clients[own].killed_at.is_none() {
                self.check_that_nobody_else_believes(process, task, key);
            }
        }
        let TaskState::Waiting { since, .. } = it.state else {
            return;
        };
        let waiting = self.waiting.get(&(process, it.key)).into_iter().flatten();
        for &(earlier, of) in waiting {
            assert!(
                earlier >= since || of == task,
                "a request overtook another one of its process"
            );
        }
    }

    fn check_that_nobody_else_believes(&self, process: usize, task: usize, key: Key) {
        let mode = self.processes[process].tasks[task].mode;
        let believed = self
            .believed
            .get(&key)
            .map(|list| &list[..])
            .unwrap_or_default();
        for &(other, of) in believed {
            let other = &self.processes[other];
            let TaskState::Holding { ticket } = other.tasks[of].state else {
                continue;
            };
            let holds = other.manager.holds_of(ticket).into_iter();
            let mut holds = holds.map(|(_, hold)| other.hold_keys[&hold]);
            let (_, _, theirs) = holds.find(|hold| hold.0 == key).expect("a hold");
            let killed = self.clients[theirs].killed_at.is_some();
            assert!(
                killed || mode == Mode::Shared && other.tasks[of].mode == Mode::Shared,
                "two believe that they hold {key} at {}",
                self.now
            );
        }
    }

    /// A connection has nothing to do: all that it holds is somebody's.
    fn check_session(&self, session: Session) {
        let client = &self.clients[session];
        let many = self.plan.tasks > 100;
        if many
            || !client.open
            || client.statement.is_some()
            || client.killed_at.is_some()
            || client.cut
        {
            return;
        }
        let it = &self.processes[client.process];
        let owned: HashSet<_> = it
            .by_ticket
            .keys()
            .flat_map(|ticket| it.manager.holds_of(*ticket))
            .filter(|(conn, _)| *conn == client.conn)
            .map(|(_, hold)| hold)
            .collect();
        let held = self.server.count(session);
        assert_eq!(held, owned.len(), "a session holds what nobody owns");
    }

    /// What holds at every step.
    fn check(&mut self) {
        for (process, key, session) in std::mem::take(&mut self.released) {
            // Another task of the process may have it.
            let it = &self.processes[process];
            let holds = it
                .by_ticket
                .keys()
                .flat_map(|ticket| it.manager.holds_of(*ticket));
            let mut keys = holds.filter_map(|(_, hold)| it.hold_keys.get(&hold));
            let handed_over = keys.any(|(other, ..)| *other == key);
            let held = self.server.holds(session, key) && self.clients[session].open;
            assert!(
                handed_over || !held,
                "a lock was told to be released, and is not"
            );
        }
        for process in &self.processes {
            assert!(
                process.conns.len() <= self.plan.connections,
                "more connections than the bound"
            );
        }
        if self.steps % (4 * self.plan.tasks as u64) != 0 {
            return;
        }
        for process in &self.processes {
            for task in &process.tasks {
                match task.state {
                    TaskState::Holding { ticket } => {
                        let holds = process.manager.holds_of(ticket).into_iter();
                        let clients =
                            holds.map(|(_, hold)| &self.clients[process.hold_keys[&hold].2]);
                        for at in clients.filter_map(|client| client.killed_at) {
                            let late = at + SECOND + SECOND;
                            assert!(self.now < late, "a loss was not told");
                        }
                    }
                    TaskState::Waiting {
                        until: Some(until), ..
                    } => {
                        let late = until + 400 * MILLI;
                        assert!(
                            self.now < late,
                            "a limit passed and nobody was told: {:?} {until} {:?}",
                            task.key,
                            process.manager
                        );
                    }
                    _ => {}
                }
            }
        }
    }

    /// How many turns each process had.
    pub(crate) fn turns(&self) -> Vec<u64> {
        self.processes.iter().map(|process| process.turns).collect()
    }

    pub(crate) fn all_closed(&self) -> bool {
        self.processes.iter().all(|process| process.closed)
    }
}

fn sorted(slots: &[u32]) -> Vec<u32> {
    let mut slots = slots.to_vec();
    slots.sort_unstable();
    slots
}

fn key_of(what: &Wanted) -> Key {
    what.key.to_string().parse().expect("a number")
}
