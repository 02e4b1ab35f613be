//! Locks that end with a transaction of PostgreSQL, and transactions that begin with them.

use std::cell::Cell;
use std::fmt::Debug;
use std::num::NonZeroU32;
use std::time::Duration;

use dlock_core::proto::{
    Answer, Bind, Columns, ErrorFields, Postgres, Session, Step, TransactionDialect,
};

use crate::postgres::{Server as Sessions, between, keys, list, number};
use crate::walk::*;

/// Adds transactions to what the sessions do.
struct Server {
    /// Not READ COMMITTED.
    isolated: bool,
    /// `transaction_timeout` is set.
    limited: bool,
    /// How often it was put back.
    put_back: Cell<u32>,
}

const INSIDE: Session = Session {
    depth: NonZeroU32::new(1),
    test_transaction: false,
};

fn detail(token: &str) -> Answer {
    Answer::Error(ErrorFields {
        detail: Some(format!("Token \"{token}\" is invalid.")),
        ..ErrorFields::default()
    })
}

fn failed() -> Answer {
    Answer::Error(ErrorFields::default())
}

/// The world after a statement that failed.
fn aborted(mut world: World) -> World {
    if let Some(transaction) = &mut world.transaction {
        transaction.aborted = true;
    }
    world
}

impl Server {
    /// One statement of a message. `Err` with what it fails with.
    fn execute(&self, world: &mut World, statement: &str) -> Result<(), Answer> {
        let word = |at: usize| statement.split(' ').nth(at).unwrap_or_default().to_owned();
        if statement == "BEGIN" {
            world.transaction.get_or_insert_default();
            return Ok(());
        }
        if statement == "ROLLBACK" {
            world.transaction = None;
            return Ok(());
        }
        if let Some(transaction) = &mut world.transaction {
            if statement.starts_with("ROLLBACK TO SAVEPOINT") {
                let at = transaction
                    .savepoints
                    .iter()
                    .rposition(|(name, _)| *name == word(3));
                let at = at.ok_or_else(failed)?;
                transaction.locks = transaction.savepoints[at].1;
                transaction.aborted = false;
                transaction.savepoints.truncate(at + 1);
                return Ok(());
            }
            if transaction.aborted {
                return Err(failed());
            }
            if statement.starts_with("SAVEPOINT") {
                transaction.savepoints.push((word(1), transaction.locks));
                return Ok(());
            }
            if statement.starts_with("RELEASE SAVEPOINT") {
                let at = transaction
                    .savepoints
                    .iter()
                    .rposition(|(name, _)| *name == word(2));
                transaction.savepoints.truncate(at.ok_or_else(failed)?);
                return Ok(());
            }
        }
        if statement.contains("unnest") {
            return self.take(world, statement);
        }
        // Settings.
        assert!(statement.contains("set_config"), "{statement}");
        if let Some(transaction) = &mut world.transaction {
            transaction.lifted |= statement.contains("set_config('transaction_timeout', '0'");
            if statement.contains("set_config('transaction_timeout', pg_catalog.current_setting") {
                assert!(transaction.lifted, "{statement}");
                transaction.lifted = false;
                self.put_back.set(self.put_back.get() + 1);
            }
        }
        Ok(())
    }

    fn take(&self, world: &mut World, statement: &str) -> Result<(), Answer> {
        let keys = list(between(statement, "unnest('", "'::bigint[]"));
        if statement.contains("transaction_isolation") && self.isolated {
            return Err(detail("repeatable"));
        }
        if statement.contains("pg_advisory_unlock") && !statement.contains("xact") {
            // Sent behind a conversation that was abandoned.
            let message = format!("SELECT 1; {statement}");
            crate::walk::Server::obey(&Sessions, world, &message);
            return Ok(());
        }
        let hands_over = statement.contains("pg_advisory_unlock");
        let taken = keys.iter().any(|key| world.taken[*key]);
        if taken {
            assert!(!hands_over && statement.contains("dlock_taken"));
            let cut_short = self.limited && statement.contains("dlock_cut_short");
            return Err(detail(if cut_short {
                "dlock_cut_short"
            } else {
                "dlock_taken"
            }));
        }
        let transaction = world.transaction.as_mut().ok_or_else(failed)?;
        for key in keys {
            transaction.locks[key] = true;
            if hands_over {
                world.holds[key] -= 1;
            }
        }
        Ok(())
    }

    fn batch(&self, world: &World, text: &str) -> Vec<Outcome> {
        let mut next = world.clone();
        let mut outcomes = Vec::new();
        for statement in text.split("; ") {
            // A cancel before it.
            outcomes.push(fault(aborted(next.clone())));
            if let Err(answer) = self.execute(&mut next, statement) {
                outcomes.insert(0, fine(answer, aborted(next)));
                return outcomes;
            }
        }
        outcomes.insert(0, fine(Answer::Done, next));
        outcomes
    }

    fn query(
        &self,
        world: &World,
        statement: &dlock_core::proto::Statement,
    ) -> Option<Vec<Outcome>> {
        let transaction = world.transaction.as_ref()?;
        let text = statement.sql.concat();
        let failure = fault(aborted(world.clone()));
        if transaction.aborted {
            return Some(vec![fine(failed(), world.clone())]);
        }
        let first = statement.binds.iter().next();
        let keys = match first {
            Some(Bind::Text(array)) => list(array),
            Some(Bind::BigInt(key)) => vec![*key as usize - 1],
            other => panic!("{other:?}"),
        };
        if text.contains("pg_locks") {
            return Some(vec![fine(number(0), world.clone()), failure]);
        }
        assert!(text.contains("pg_try_advisory_xact_lock"), "{text}");
        assert!(
            transaction.lifted || !self.limited,
            "the user's limit counts while it waits"
        );
        let mut next = world.clone();
        let locks = &mut next.transaction.as_mut()?.locks;
        let mut answer = 1;
        for (place, key) in keys.iter().enumerate() {
            if world.taken[*key] {
                answer = match statement.columns {
                    Columns::NoRow => -(place as i64) - 1,
                    _ => 0,
                };
                break;
            }
            locks[*key] = true;
        }
        Some(vec![fine(number(answer), next), failure])
    }
}

impl crate::walk::Server for Server {
    fn receive<T: Debug>(&self, world: &World, step: &Step<T>) -> (Vec<Outcome>, bool) {
        match step {
            Step::Batch(text) => (self.batch(world, text), true),
            Step::Query(statement) => match self.query(world, statement) {
                Some(outcomes) => (outcomes, true),
                None => Sessions::query(world, statement),
            },
            other => panic!("{other:?}"),
        }
    }

    fn obey(&self, world: &mut World, message: &str) {
        if message == "ROLLBACK" {
            world.transaction = None;
            return;
        }
        Sessions.obey(world, message);
    }
}

fn transaction_has_all(before: &World, now: &World) -> bool {
    let open = before.transaction.clone().unwrap_or_default();
    let transaction = now.transaction.as_ref();
    now.holds == before.holds
        && transaction.is_some_and(|transaction| {
            !transaction.aborted
                && transaction.locks == [true; KEYS]
                && transaction.savepoints == open.savepoints
                && !transaction.lifted
        })
}

const LIMITS: [(Option<Duration>, bool); 4] = [
    (Some(Duration::ZERO), false),
    (Some(Duration::ZERO), true),
    (Some(Duration::from_millis(90)), false),
    (None, true),
];

#[test]
fn a_transaction_that_begins_gets_all_or_does_not_begin() {
    let (mut granted, mut put_back) = (0, 0);
    for isolated in [false, true] {
        for world in worlds() {
            for (limit, droppable) in LIMITS {
                let ask = ask(keys(), limit, droppable);
                let begin = || Postgres::begin(&ask).expect("valid keys");
                let limited = limit.is_none();
                let server = Server {
                    isolated,
                    limited,
                    put_back: Cell::new(0),
                };
                let count = explore(
                    &server,
                    &world,
                    begin,
                    droppable,
                    transaction_has_all,
                    |(), _| {},
                );
                granted += count.granted;
                put_back += server.put_back.get();
                assert!(count.failed > 3, "{count:?}");
            }
        }
    }
    assert!(granted > 50, "{granted}");
    assert!(put_back > 20, "{put_back}");
}

#[test]
fn an_open_transaction_gets_all_or_none_and_goes_on() {
    let mut granted = 0;
    for mut world in worlds() {
        world.transaction = Some(Transaction {
            savepoints: vec![("the_users".into(), [false; KEYS])],
            ..Transaction::default()
        });
        for (limit, droppable) in LIMITS {
            let ask = ask(keys(), limit, droppable);
            let acquire = || Postgres::acquire_in_transaction(&ask, INSIDE).expect("valid keys");
            let server = Server {
                isolated: false,
                limited: false,
                put_back: Cell::new(0),
            };
            let count = explore(
                &server,
                &world,
                acquire,
                droppable,
                transaction_has_all,
                |(), _| {},
            );
            granted += count.granted;
            assert!(count.failed > 3, "{count:?}");
        }
    }
    assert!(granted > 50, "{granted}");
}
