//! What every process believed, and when: a line for each event.
//!
//! `TIME ACTOR WORD name=value ..`, with the time in nanoseconds of one clock. An actor is a thread or a task
//! (`w1.3.t0`: worker 1, its third process, thread 0), or the `controller`. Lines need no order.
//!
//! | word | of a worker |
//! |---|---|
//! | `ask` | before a lock is asked for: `op keys mode form`, and of a connection `session opened` |
//! | `in` | after it was granted (a managed lock: before a look that found it not lost); `slot` of a semaphore |
//! | `look` | before a look that found a managed lock not lost |
//! | `out` | before it is given up; of a managed lock, the last such look |
//! | `token` | after a fencing token was drawn |
//! | `wrote` | after a write with the token: `key from token changed` |
//! | `adding`, `added` | before and after a counter was set: `key value` |
//! | `end` | after everything: `result`, which is `ok`, `busy`, `dropped`, `panic`, or the kind of an error; `polls` of a future that was dropped |
//! | `opened` | a manager has opened a session: `session from` |
//! | `dirty` | a connection of the pool held a lock: `session` |
//! | `unfit` | a connection of the pool did not answer, or not to the question: `session opened` |
//!
//! | word | of the controller |
//! |---|---|
//! | `fault` | `kind from until`, and which `worker` or `session` |
//! | `counter` | at the end: `key value` |
//! | `sum` | at the end: `value expected` |
//! | `free` | at the end: `key`, and the nanoseconds `after` all had gone; `kept` if it was not freed |
//! | `wrong` | something else that must not happen: `text` |

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use crate::proof::clock::now;

/// Appends to a history. Each line is one write, so a process that is killed leaves whole lines.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    file: Arc<File>,
}

impl Writer {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        Ok(Self { file: file.into() })
    }

    pub(crate) fn write(&self, actor: &str, event: fmt::Arguments<'_>) {
        self.write_at(now(), actor, event);
    }

    pub(crate) fn write_at(&self, time: u64, actor: &str, event: fmt::Arguments<'_>) {
        let line = format!("{time} {actor} {event}\n");
        let written = (&*self.file).write_all(line.as_bytes());
        written.expect("the history can be written");
    }
}

/// How much a lock excludes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Exclusive,
    Shared,
    /// A semaphore.
    Permits(u32),
}

/// A write that a fencing token guards.
#[derive(Debug, Clone)]
pub(crate) struct FencedWrite {
    pub(crate) key: String,
    pub(crate) from: u64,
    pub(crate) at: u64,
    pub(crate) token: i64,
    pub(crate) changed: bool,
}

/// What one actor did about one lock.
#[derive(Debug, Clone)]
pub(crate) struct Op {
    pub(crate) actor: String,
    /// The process.
    pub(crate) worker: String,
    pub(crate) number: u64,
    pub(crate) keys: Vec<String>,
    pub(crate) mode: Mode,
    pub(crate) form: String,
    /// Of a lock on a connection.
    pub(crate) session: Option<String>,
    pub(crate) opened: u64,
    pub(crate) asked: u64,
    pub(crate) entered: Option<u64>,
    pub(crate) slot: Option<u32>,
    pub(crate) looked: u64,
    pub(crate) left: Option<u64>,
    pub(crate) token: Option<(u64, i64)>,
    pub(crate) writes: Vec<FencedWrite>,
    pub(crate) adding: Vec<(String, i64)>,
    pub(crate) added: Vec<(String, i64)>,
    pub(crate) ended: Option<(u64, String, String)>,
    /// After so many polls its future was dropped.
    pub(crate) polls: Option<u64>,
}

impl Op {
    pub(crate) fn is_managed(&self) -> bool {
        self.session.is_none()
    }
}

/// Something that the controller broke.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) kind: String,
    pub(crate) from: u64,
    pub(crate) until: u64,
    pub(crate) worker: Option<String>,
    pub(crate) session: Option<String>,
}

/// A connection of a pool that was not marked broken, and failed.
#[derive(Debug, Clone)]
pub(crate) struct Unfit {
    pub(crate) at: u64,
    pub(crate) worker: String,
    pub(crate) session: String,
    pub(crate) opened: u64,
    pub(crate) text: String,
}

/// All events of one round.
#[derive(Debug, Clone, Default)]
pub struct History {
    pub(crate) ops: Vec<Op>,
    pub(crate) faults: Vec<Fault>,
    /// The sessions of managers: process, session.
    pub(crate) opened: Vec<(String, String)>,
    pub(crate) dirty: Vec<String>,
    pub(crate) unfit: Vec<Unfit>,
    pub(crate) counters: Vec<(String, i64)>,
    pub(crate) sums: Vec<(i64, i64)>,
    pub(crate) freed: Vec<u64>,
    pub(crate) kept: Vec<String>,
    pub(crate) wrong: Vec<String>,
    numbers: HashMap<(String, u64), usize>,
}

impl History {
    /// Adds the lines of a text.
    ///
    /// # Errors
    ///
    /// If a line cannot be read. The last line may be cut off.
    pub fn read(&mut self, text: &str) -> Result<(), String> {
        for line in text.split_inclusive('\n') {
            let Some(whole) = line.strip_suffix('\n') else {
                continue;
            };
            if !whole.trim().is_empty() {
                self.line(whole.trim())
                    .map_err(|error| format!("{whole}: {error}"))?;
            }
        }
        Ok(())
    }

    fn line(&mut self, line: &str) -> Result<(), String> {
        let (line, text) = line.split_once(" text=").unwrap_or((line, ""));
        let mut words = line.split_whitespace();
        let time: u64 = number(words.next().ok_or("no time")?)?;
        let actor = words.next().ok_or("no actor")?;
        let word = words.next().ok_or("no word")?;
        let fields: Vec<(&str, &str)> = words
            .map(|field| {
                field
                    .split_once('=')
                    .ok_or_else(|| format!("{field}: no value"))
            })
            .collect::<Result<_, _>>()?;
        let find = |name: &str| {
            fields
                .iter()
                .find(|(found, _)| *found == name)
                .map(|(_, value)| *value)
        };
        let get = |name: &str| find(name).ok_or_else(|| format!("no {name}"));
        match word {
            "fault" => self.faults.push(Fault {
                kind: get("kind")?.to_owned(),
                from: number(get("from")?)?,
                until: number(get("until")?)?,
                worker: find("worker").map(str::to_owned),
                session: find("session").map(str::to_owned),
            }),
            "counter" => self
                .counters
                .push((get("key")?.to_owned(), number(get("value")?)?)),
            "sum" => self
                .sums
                .push((number(get("value")?)?, number(get("expected")?)?)),
            "free" => self.freed.push(number(get("after")?)?),
            "kept" => self.kept.push(get("key")?.to_owned()),
            "wrong" => self.wrong.push(text.to_owned()),
            "dirty" => self
                .dirty
                .push(format!("{actor}: session {}", get("session")?)),
            "unfit" => self.unfit.push(Unfit {
                at: time,
                worker: process(actor),
                session: get("session")?.to_owned(),
                opened: number(get("opened")?)?,
                text: text.to_owned(),
            }),
            "opened" => self
                .opened
                .push((process(actor), get("session")?.to_owned())),
            "ask" => {
                let op = number(get("op")?)?;
                self.numbers.insert((actor.to_owned(), op), self.ops.len());
                self.ops.push(Op {
                    actor: actor.to_owned(),
                    worker: process(actor),
                    number: op,
                    keys: get("keys")?.split(',').map(str::to_owned).collect(),
                    mode: match get("mode")? {
                        "exclusive" => Mode::Exclusive,
                        "shared" => Mode::Shared,
                        permits => Mode::Permits(number(permits)?),
                    },
                    form: get("form")?.to_owned(),
                    session: find("session").map(str::to_owned),
                    opened: find("opened").map_or(Ok(0), number)?,
                    asked: time,
                    entered: None,
                    slot: None,
                    looked: 0,
                    left: None,
                    token: None,
                    writes: Vec::new(),
                    adding: Vec::new(),
                    added: Vec::new(),
                    ended: None,
                    polls: None,
                });
            }
            _ => {
                let op: u64 = number(get("op")?)?;
                let at = self
                    .numbers
                    .get(&(actor.to_owned(), op))
                    .ok_or("nothing was asked for")?;
                let op = &mut self.ops[*at];
                let counted = || Ok::<_, String>((get("key")?.to_owned(), number(get("value")?)?));
                match word {
                    "in" => {
                        op.entered = Some(time);
                        op.looked = op.looked.max(time);
                        op.slot = find("slot").map(number).transpose()?;
                    }
                    "look" => op.looked = op.looked.max(time),
                    "out" => op.left = Some(time),
                    "token" => op.token = Some((time, number(get("value")?)?)),
                    "wrote" => op.writes.push(FencedWrite {
                        key: get("key")?.to_owned(),
                        from: number(get("from")?)?,
                        at: time,
                        token: number(get("token")?)?,
                        changed: get("changed")? == "1",
                    }),
                    "adding" => op.adding.push(counted()?),
                    "added" => op.added.push(counted()?),
                    "end" => {
                        op.polls = find("polls").map(number).transpose()?;
                        op.ended = Some((time, get("result")?.to_owned(), text.to_owned()));
                    }
                    other => return Err(format!("unknown word {other}")),
                }
            }
        }
        Ok(())
    }
}

fn number<T: std::str::FromStr<Err: fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error| format!("{text}: {error}"))
}

/// `w1.3` of `w1.3.t0`.
fn process(actor: &str) -> String {
    actor
        .rsplit_once('.')
        .map_or(actor, |(process, _)| process)
        .to_owned()
}
