use std::cell::RefCell;
use std::time::{Duration, Instant};

use dlock_tests::{Kind, Proxy, Server, unique_key};

use crate::processor::OneProcessor;
use crate::report::{Section, ratio, spread};
use crate::session::{Api, Session, Transaction};
use crate::{Bench, raw, slug};

fn empty(session: &mut dyn Session, by: Transaction) -> Duration {
    let begin = Instant::now();
    session.transaction(by);
    begin.elapsed()
}

/// The round trips of a transaction, once all is prepared.
fn round_trips(api: Api, server: &Server, by: Transaction) -> u64 {
    let proxy = Proxy::start(server);
    let mut session = api.open_url(server.kind, proxy.url(), &unique_key("bench/trips"));
    session.transaction(by);
    proxy.reset();
    session.transaction(by);
    proxy.round_trips()
}

pub(crate) fn run(bench: &mut Bench) -> Section {
    let mut section = Section::new("2. A transaction under a lock");
    section.paragraph("`advisory_lock(key).transaction(..)` with nothing in it. Compared with");
    section.items(&[
        format!(
            "raw on PostgreSQL: {}",
            raw::transaction_text(Kind::Postgres)
        ),
        format!(
            "raw on MySQL and MariaDB: {}",
            raw::transaction_text(Kind::Mysql)
        ),
        "plain: Diesel's `conn.transaction(..)`, which takes no lock".into(),
    ]);
    let mut processor = OneProcessor::enter();
    let pace = bench.pace(Duration::ZERO);
    let mut rows = Vec::new();
    for server in bench.servers.clone() {
        for api in Api::BOTH {
            let session =
                RefCell::new(processor.open(api, server, &unique_key("bench/transaction")));
            let mut dlock = || empty(&mut **session.borrow_mut(), Transaction::Dlock);
            let mut raw = || empty(&mut **session.borrow_mut(), Transaction::Raw);
            let mut plain = || empty(&mut **session.borrow_mut(), Transaction::Plain);
            let name = |what| slug(&format!("2 {} {api} {what}", server.name));
            let against_raw = bench.duels.fight(&name("raw"), pace, &mut dlock, &mut raw);
            let against_plain = bench
                .duels
                .fight(&name("plain"), pace, &mut dlock, &mut plain);
            let what = format!("{} {api}: transaction against raw", server.name);
            let bar = section.at_most(what, against_raw.ratio.median, 1.05, "×");
            let trips = round_trips(api, server, Transaction::Dlock);
            for (by, outcome, bar) in [
                (Transaction::Raw, against_raw, bar.as_str()),
                (Transaction::Plain, against_plain, ""),
            ] {
                rows.push(vec![
                    server.name.clone(),
                    api.to_string(),
                    if by == Transaction::Raw {
                        "raw"
                    } else {
                        "plain"
                    }
                    .into(),
                    spread(&outcome.ours),
                    spread(&outcome.theirs),
                    ratio(&outcome.ratio),
                    format!("{trips} : {}", round_trips(api, server, by)),
                    bar.into(),
                ]);
            }
        }
    }
    processor.tell(&mut section);
    section.table(
        &[
            "server",
            "API",
            "against",
            "dlock",
            "the other",
            "ratio",
            "round trips",
            "bar",
        ],
        &rows,
    );
    section.if_missed(
        "PostgreSQL",
        "PostgreSQL: a text of several statements cannot be kept prepared, so the server parses and plans it each time, \
         and dlock's says more than raw. It looks at the isolation level, because at other levels than READ COMMITTED the \
         transaction would not see what the previous holder committed; it refuses a standby, whose locks are its own; and \
         it has the wait at hand, which is parsed only if the lock is taken.",
    );
    for server in bench.of_kind(Kind::Mysql) {
        section.if_missed(
            &format!("{} async: transaction", server.name),
            &format!(
                "{}, async: what the free lock of section 1 costs, and Diesel's own `begin_transaction` and \
                 `commit_transaction` in place of two raw statements.",
                server.name
            ),
        );
    }
    section
}
