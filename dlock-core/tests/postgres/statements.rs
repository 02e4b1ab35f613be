//! The texts that are sent most, word by word, and what all texts have in common.

use dlock_core::proto::{
    Ask, Bind, Columns, Dialect, Machine, Postgres, Prepared, Statement, Step, TransactionDialect,
};
use dlock_core::{LockKey, Mode};

use crate::common::*;
use crate::script::*;

/// The forms of a key and a mode: what they are called in a function, as binds from `$1` on, and in a text.
struct Form {
    key: LockKey,
    mode: Mode,
    lock: &'static str,
    binds: Vec<Bind>,
    literal: &'static str,
}

fn forms() -> Vec<Form> {
    let mut forms = Vec::new();
    for (mode, lock) in [(Mode::Exclusive, "lock"), (Mode::Shared, "lock_shared")] {
        forms.push(Form {
            key: (-42).into(),
            mode,
            lock,
            binds: vec![Bind::BigInt(-42)],
            literal: "'-42'::bigint",
        });
        forms.push(Form {
            key: (1, -2).into(),
            mode,
            lock,
            binds: vec![Bind::Integer(1), Bind::Integer(-2)],
            literal: "'1'::int, '-2'::int",
        });
    }
    forms
}

impl Form {
    fn ask(&self, ask: Ask) -> &'static Ask {
        leak(Ask {
            key: self.key.clone(),
            mode: self.mode,
            ..ask
        })
    }

    /// `$2, $3`
    fn numbers(&self, first: usize) -> String {
        let numbers = (0..self.binds.len()).map(|bind| format!("${}", first + bind));
        numbers.collect::<Vec<_>>().join(", ")
    }

    /// `?, ?`
    fn places(&self) -> String {
        vec!["?"; self.binds.len()].join(", ")
    }

    fn name(&self, names: [Prepared; 4]) -> Prepared {
        match (self.binds.len(), self.mode) {
            (1, Mode::Exclusive) => names[0],
            (1, Mode::Shared) => names[1],
            (_, Mode::Exclusive) => names[2],
            (_, Mode::Shared) => names[3],
        }
    }
}

fn binds(statement: &Statement) -> Vec<Bind> {
    statement.binds.iter().cloned().collect()
}

/// No row is a grant, or a release.
fn no_row_if(condition: &str) -> String {
    format!("SELECT WHERE NOT CASE WHEN {condition}")
}

/// The same, where a row is read.
fn no_row_or_why_if(condition: &str) -> String {
    format!(
        "SELECT CASE WHEN {OWN_LOCKS} THEN 3::bigint ELSE 0 END WHERE NOT CASE WHEN {condition}"
    )
}

const OWN_LOCKS: &str = "(pg_catalog.pg_is_in_recovery() OR pg_catalog.texteq(pg_catalog.current_setting(\
     'yb_silence_advisory_locks_not_supported_error', true), 'on'))";

/// The wait of the statements that try first.
fn or_wait(form: &Form, key: &str, millis: &str) -> String {
    let lock = form.lock;
    format!(
        "pg_catalog.textne(pg_catalog.current_setting('transaction_timeout', true), '0') THEN false \
         ELSE pg_catalog.set_config('lock_timeout', pg_catalog.format('%s', \
         pg_catalog.current_setting('lock_timeout'), pg_catalog.set_config('lock_timeout', {millis}, true), \
         pg_catalog.pg_advisory_xact_{lock}({key}), pg_catalog.pg_sleep(0)), true) IS NOT NULL \
         AND pg_catalog.pg_advisory_{lock}({key}) IS NOT NULL END"
    )
}

#[test]
fn a_session_acquires() {
    use Prepared::*;
    for form in forms() {
        let (lock, key, places) = (form.lock, form.numbers(1), form.places());
        let tries = format!(
            "{OWN_LOCKS} THEN false WHEN pg_catalog.pg_try_advisory_{lock}({places}) THEN true WHEN "
        );

        let script = play(Postgres::acquire(form.ask(asked(FOREVER)), OUTSIDE).unwrap());
        let text = no_row_if(&format!("{tries}{}", or_wait(&form, &key, "'900'")));
        assert_eq!(script.statement().text(), text);
        assert_eq!(script.statement().columns, Columns::AnyRow);
        assert_eq!(binds(script.statement()), form.binds);
        let names = [
            PostgresFirst,
            PostgresFirstShared,
            PostgresFirstPair,
            PostgresFirstPairShared,
        ];
        assert_eq!(script.statement().prepared, form.name(names));

        let ask = form.ask(asked(limit(millis(250))));
        let script = play(Postgres::acquire(ask, OUTSIDE).unwrap());
        let millis = format!("${}", form.binds.len() + 1);
        let text = no_row_if(&format!(
            "{tries}? IS NULL OR {}",
            or_wait(&form, &key, &millis)
        ));
        assert_eq!(script.statement().text(), text);
        assert_eq!(script.statement().columns, Columns::AnyRow);
        let expected = [form.binds.clone(), vec![Bind::Text("250".into())]].concat();
        assert_eq!(binds(script.statement()), expected);
        let names = [
            PostgresLimited,
            PostgresLimitedShared,
            PostgresLimitedPair,
            PostgresLimitedPairShared,
        ];
        assert_eq!(script.statement().prepared, form.name(names));

        let script = play(Postgres::acquire(form.ask(asked(TRY)), OUTSIDE).unwrap());
        let text = no_row_or_why_if(&format!(
            "{} IS NULL OR {OWN_LOCKS} THEN false ELSE pg_catalog.pg_try_advisory_{lock}({key}) END",
            places.replace(", ", " IS NULL OR ")
        ));
        assert_eq!(script.statement().text(), text);
        assert_eq!(script.statement().columns, Columns::NoRow);
        assert_eq!(binds(script.statement()), form.binds);
        let names = [
            PostgresTry,
            PostgresTryShared,
            PostgresTryPair,
            PostgresTryPairShared,
        ];
        assert_eq!(script.statement().prepared, form.name(names));
    }
}

#[test]
fn a_session_acquires_and_releases_what_may_be_dropped() {
    use Prepared::*;
    for form in forms() {
        let (lock, key, places) = (form.lock, form.numbers(2), form.places());
        let names = [
            PostgresDroppable,
            PostgresDroppableShared,
            PostgresDroppablePair,
            PostgresDroppablePairShared,
        ];
        let wait = or_wait(&form, &key, "$1");
        let text = no_row_or_why_if(&format!(
            "? IS NULL THEN pg_catalog.pg_advisory_un{lock}({places}) \
             WHEN {OWN_LOCKS} THEN false WHEN CASE WHEN pg_catalog.pg_try_advisory_{lock}({key}) THEN true \
             WHEN pg_catalog.starts_with($1, '0') OR {wait} \
             THEN pg_catalog.set_config('dlock.granted', $1, false) IS NOT NULL ELSE false END"
        ));
        // diesel-async puts the text together for each execution, and for more than this glibc takes longer.
        let is_short = text.replace('?', "$1").len() <= 1032;
        assert!(is_short || form.mode == Mode::Shared || form.binds.len() > 1);
        let script = play(Postgres::acquire(form.ask(droppable(FOREVER)), OUTSIDE).unwrap());
        assert_eq!(script.statement().text(), text);
        assert_eq!(script.statement().columns, Columns::AnyRow);
        assert_eq!(binds(script.statement())[1..], form.binds);
        assert_eq!(script.statement().prepared, form.name(names));

        let tries = play(Postgres::acquire(form.ask(droppable(TRY)), OUTSIDE).unwrap());
        assert_eq!(tries.statement().text(), text);
        assert_eq!(tries.statement().columns, Columns::NoRow);

        let hold = script.answer(value(1)).holds();
        let script = play(Postgres::release(hold, OUTSIDE));
        assert_eq!(script.statement().text(), text);
        assert_eq!(script.statement().columns, Columns::AnyRow);
        let expected = [vec![Bind::NoText], form.binds.clone()].concat();
        assert_eq!(binds(script.statement()), expected);
        assert_eq!(script.statement().prepared, form.name(names));
    }
}

#[test]
fn a_session_releases() {
    use Prepared::*;
    for form in forms() {
        let script = play(Postgres::acquire(form.ask(asked(FOREVER)), OUTSIDE).unwrap());
        let script = play(Postgres::release(script.answer(value(1)).holds(), OUTSIDE));
        let (lock, places) = (form.lock, form.places());
        assert_eq!(
            script.statement().text(),
            format!("SELECT WHERE NOT pg_catalog.pg_advisory_un{lock}({places})")
        );
        assert_eq!(script.statement().columns, Columns::AnyRow);
        assert_eq!(binds(script.statement()), form.binds);
        let names = [
            PostgresUnlock,
            PostgresUnlockShared,
            PostgresUnlockPair,
            PostgresUnlockPairShared,
        ];
        assert_eq!(script.statement().prepared, form.name(names));
    }
}

#[test]
fn a_transaction_acquires() {
    for form in forms() {
        let ask = form.ask(asked(FOREVER));
        let script = play(Postgres::acquire_in_transaction(ask, INSIDE).unwrap());
        let (lock, places) = (form.lock, form.places());
        assert_eq!(
            script.statement().text(),
            format!(
                "SELECT (CASE WHEN (pg_catalog.pg_is_in_recovery() OR pg_catalog.texteq(pg_catalog.current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) THEN 3 \
                 ELSE pg_catalog.pg_try_advisory_xact_{lock}({places})::int END)::bigint"
            )
        );
        assert_eq!(binds(script.statement()), form.binds);
    }
}

#[test]
fn a_transaction_begins() {
    for form in forms() {
        let (lock, literal) = (form.lock, form.literal);
        let committed = "pg_catalog.texteq(pg_catalog.current_setting('transaction_isolation'), 'read committed')";
        let begins = |wait: &str| {
            format!(
                "BEGIN; SELECT pg_catalog.query_to_xml($dlock$SELECT WHERE CASE \
                 WHEN (pg_catalog.pg_is_in_recovery() OR pg_catalog.texteq(pg_catalog.current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) \
                 THEN pg_catalog.concat('dlock_standby')::pg_catalog.json IS NULL \
                 WHEN {committed} THEN {wait} ELSE pg_catalog.current_setting('transaction_isolation')::pg_catalog.json IS NULL END$dlock$, \
                 true, true, '') WHERE NOT CASE \
                 WHEN (pg_catalog.pg_is_in_recovery() OR pg_catalog.texteq(pg_catalog.current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) THEN false WHEN {committed} \
                 THEN pg_catalog.pg_try_advisory_xact_{lock}({literal}) ELSE false END"
            )
        };
        let waits = format!(
            "CASE WHEN pg_catalog.textne(pg_catalog.current_setting('transaction_timeout', true), '0') \
             THEN pg_catalog.concat('dlock_cut_short')::pg_catalog.json IS NULL \
             ELSE pg_catalog.set_config('lock_timeout', pg_catalog.format('%s', \
             pg_catalog.current_setting('lock_timeout'), pg_catalog.set_config('lock_timeout', '900', true), \
             pg_catalog.pg_advisory_xact_{lock}({literal})), true) IS NULL END"
        );
        play(Postgres::begin(form.ask(asked(FOREVER))).unwrap()).batch(&begins(&waits));
        let fails = "pg_catalog.concat('dlock_taken')::pg_catalog.json IS NULL";
        play(Postgres::begin(form.ask(asked(TRY))).unwrap()).batch(&begins(fails));
    }
}

#[test]
fn a_key_is_a_constant_of_its_type() {
    let ask = leak(Ask {
        key: i64::MIN.into(),
        ..asked(FOREVER)
    });
    let script = play(Postgres::begin(ask).unwrap());
    assert!(script.text().contains("('-9223372036854775808'::bigint)"));
}

#[test]
fn the_mode_is_asked_for_by_its_name() {
    for (mode, name) in [
        (Mode::Exclusive, "ExclusiveLock"),
        (Mode::Shared, "ShareLock"),
    ] {
        let ask = leak(Ask {
            mode,
            ..droppable(FOREVER)
        });
        let held = format!("pg_catalog.texteq(l.mode, '{name}')");
        let verifying = play(Postgres::acquire(ask, OUTSIDE).unwrap()).answer(plain());
        assert!(verifying.statement().text().contains(&held));
        let before = play(Postgres::acquire(ask, INSIDE).unwrap());
        assert!(before.statement().text().contains(&held));
        let waiting = before.answer(value(0));
        assert!(waiting.abandoned().messages[0].contains(&held));
    }
}

/// Each text that machines send on some way through.
fn texts() -> Vec<String> {
    let mut texts = Vec::new();
    let mut collect = |step: &Step<()>| match step {
        Step::Query(statement) => texts.push(statement.text()),
        Step::Batch(text) => texts.push(text.clone().into_owned()),
        _ => {}
    };
    fn through<M: Machine<Output: std::fmt::Debug>>(
        machine: M,
        answers: &[dlock_core::proto::Answer],
        collect: &mut impl FnMut(&Step<()>),
    ) {
        let mut script = play(machine);
        for answer in answers {
            collect(&shape(script.step()));
            for message in script.abandoned().messages {
                collect(&Step::Batch(message));
            }
            script = script.after(millis(900)).answer(answer.clone());
        }
        collect(&shape(script.step()));
    }
    fn shape<T>(step: &Step<T>) -> Step<()> {
        match step {
            Step::Query(statement) => Step::Query(statement.clone()),
            Step::Batch(text) => Step::Batch(text.clone()),
            Step::Sleep(duration) => Step::Sleep(*duration),
            Step::Tell(holders) => Step::Tell(holders.clone()),
            Step::Done(_) => Step::Done(Ok(())),
        }
    }
    for form in forms() {
        let session = form.ask(droppable(FOREVER));
        for answers in [
            vec![value(0), plain(), value(0), value(900), DONE],
            vec![plain(), value(0), value(900), plain(), value(1)],
            vec![unknown_function(), value(0)],
        ] {
            through(
                Postgres::acquire(session, OUTSIDE).unwrap(),
                &answers,
                &mut collect,
            );
        }
        through(
            Postgres::acquire(session, INSIDE).unwrap(),
            &[
                value(0),
                plain(),
                DONE,
                value(0),
                value(900),
                DONE,
                value(1),
            ],
            &mut collect,
        );
        let transaction = Postgres::acquire_in_transaction(session, INSIDE).unwrap();
        through(
            transaction,
            &[value(0), plain(), DONE, value(900), DONE],
            &mut collect,
        );
        let begin = || Postgres::begin(session).unwrap();
        through(
            begin(),
            &[plain(), DONE, value(-900), plain(), DONE],
            &mut collect,
        );
        through(
            begin(),
            &[token("serializable"), plain(), DONE, value(0), value(1)],
            &mut collect,
        );
    }
    texts
}

/// By its last piece, the server is asked whether the session knows the prepared statement that has failed.
#[test]
fn the_last_piece_of_what_acquires_is_in_no_other_text() {
    let mut statements: Vec<Statement> = Vec::new();
    for form in forms() {
        for wait in [FOREVER, TRY, limit(millis(250))] {
            for ask in [asked(wait), droppable(wait)] {
                let script = play(Postgres::acquire(form.ask(ask), OUTSIDE).unwrap());
                statements.push(script.statement().clone());
            }
        }
    }
    for statement in &statements {
        let last = statement.sql.last().expect("a piece");
        for other in &statements {
            let is_in = other.sql.concat().contains(last);
            assert_eq!(is_in, other.prepared == statement.prepared, "{last}");
        }
    }
}

/// So that PostgreSQL's own functions are called, whatever `search_path` says.
#[test]
fn every_function_is_named_with_its_schema() {
    for text in texts() {
        let mut before = 0;
        for (at, _) in text.match_indices('(') {
            let is_word = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
            let start = text[..at]
                .rfind(|letter| !is_word(letter))
                .map_or(0, |end| end + 1);
            let word = &text[start..at];
            let keywords = [
                "", "EXISTS", "coalesce", "extract", "least", "greatest", "AND", "SELECT", "WHEN",
                "OPERATOR", "FROM", "OR", "IF",
            ];
            if !keywords.contains(&word) {
                assert!(text[..start].ends_with("pg_catalog."), "{word} in {text}");
                before += 1;
            }
        }
        assert!(before > 0 || !text.contains("SELECT"), "{text}");
    }
}

/// They are few, so that pg_stat_statements and the caches stay small. What is a constant in a SELECT is replaced
/// there.
#[test]
fn no_key_and_no_limit_stands_outside_a_select() {
    for text in texts() {
        for statement in text.replace("pg_catalog.", "").split("; ") {
            let has_number = statement.contains("42")
                || statement.contains("'1'")
                || statement.contains("-2")
                || statement.contains("900")
                || statement.contains("60000");
            assert!(
                !has_number || statement.starts_with("SELECT"),
                "{statement} in {text}"
            );
        }
    }
}
