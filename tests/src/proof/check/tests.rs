//! Histories that must be refused, and some that must not.

use super::check_text;

#[track_caller]
fn refused(text: &str, expected: &str) {
    let wrong = check_text(text).expect("a history");
    assert!(
        wrong.len() == 1 && wrong[0].contains(expected),
        "{wrong:#?}"
    );
}

#[track_caller]
fn accepted(text: &str) {
    let wrong = check_text(text).expect("a history");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// One after the other, with a token and a write each.
const TURNS: &str = "\
10 w1.1.a ask op=1 keys=k mode=exclusive form=guard session=7 opened=5
20 w1.1.a in op=1
21 w1.1.a token op=1 value=100
23 w1.1.a wrote op=1 key=k from=22 token=100 changed=1
24 w1.1.a adding op=1 key=k value=1
25 w1.1.a added op=1 key=k value=1
30 w1.1.a out op=1
31 w1.1.a end op=1 result=ok
12 w2.1.a ask op=1 keys=k mode=exclusive form=guard session=8 opened=5
40 w2.1.a in op=1
41 w2.1.a token op=1 value=200
43 w2.1.a wrote op=1 key=k from=42 token=200 changed=1
44 w2.1.a adding op=1 key=k value=2
45 w2.1.a added op=1 key=k value=2
50 w2.1.a out op=1
51 w2.1.a end op=1 result=ok
60 controller counter key=k value=2
61 controller sum value=400 expected=400
62 controller free key=k after=3
";

/// `TURNS` with some words replaced.
#[track_caller]
fn turns(changes: &[(&str, &str)]) -> String {
    changes.iter().fold(TURNS.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    })
}

#[test]
fn one_after_the_other() {
    accepted(TURNS);
    // The last line of a process that was killed while it wrote.
    accepted(&format!("{TURNS}70 w1.1.a ask op=2 ke"));
}

#[test]
fn two_at_once() {
    refused(
        &turns(&[("40 w2.1.a in", "29 w2.1.a in")]),
        "two hold k at once",
    );
}

#[test]
fn two_at_once_of_which_one_holds_several() {
    let text = turns(&[
        ("40 w2.1.a in", "29 w2.1.a in"),
        ("12 w2.1.a ask op=1 keys=k", "12 w2.1.a ask op=1 keys=j,k"),
    ]);
    refused(&text, "two hold k at once");
}

#[test]
fn a_holder_that_never_leaves() {
    refused(
        &turns(&[
            ("30 w1.1.a out op=1\n", ""),
            ("31 w1.1.a end", "45 w1.1.a end"),
        ]),
        "two hold k at once",
    );
}

#[test]
fn a_long_hold_around_short_ones() {
    let text = "\
10 w1.1.a ask op=1 keys=k mode=exclusive form=guard session=7 opened=5
20 w1.1.a in op=1
90 w1.1.a out op=1
91 w1.1.a end op=1 result=ok
10 w2.1.a ask op=1 keys=k mode=shared form=guard session=8 opened=5
95 w2.1.a in op=1
96 w2.1.a out op=1
97 w2.1.a end op=1 result=ok
10 w3.1.a ask op=1 keys=k mode=shared form=guard session=9 opened=5
80 w3.1.a in op=1
99 w3.1.a out op=1
99 w3.1.a end op=1 result=ok
";
    refused(text, "two hold k at once");
    accepted(&text.replace("80 w3", "92 w3"));
}

#[test]
fn readers_at_once_and_a_writer_among_them() {
    let shared = turns(&[("exclusive", "shared"), ("40 w2.1.a in", "29 w2.1.a in")]);
    accepted(&shared);
    let writer = shared.replace(
        "12 w2.1.a ask op=1 keys=k mode=shared",
        "12 w2.1.a ask op=1 keys=k mode=exclusive",
    );
    refused(&writer, "two hold k at once");
}

#[test]
fn a_session_that_ended_excludes_nobody_from_then_on() {
    let overlap = turns(&[("40 w2.1.a in", "29 w2.1.a in")]);
    for fault in [
        "28 controller fault kind=end from=27 until=28 session=7\n",
        "28 controller fault kind=cut from=27 until=28 worker=w1.1\n",
        "28 controller fault kind=restart from=27 until=28\n",
        "28 controller fault kind=kill from=27 until=28 worker=w1.1\n",
    ] {
        accepted(&format!("{overlap}{fault}"));
    }
    for fault in [
        // Another session, another process, and one that was opened later.
        "28 controller fault kind=end from=27 until=28 session=9\n",
        "28 controller fault kind=cut from=27 until=28 worker=w3.1\n",
        "5 controller fault kind=restart from=3 until=5\n",
        // What frees no lock.
        "28 controller fault kind=cancel from=27 until=28 session=7\n",
        "28 controller fault kind=stop from=27 until=28 worker=w1.1\n",
        "28 controller fault kind=silence from=27 until=28 worker=w1.1\n",
        // It came after the other had the lock.
        "35 controller fault kind=end from=34 until=35 session=7\n",
    ] {
        refused(&format!("{overlap}{fault}"), "two hold k at once");
    }
}

/// A managed lock whose process was stopped, or whose network was silent, and another holder.
const LEASE: &str = "\
10 w1.1.a ask op=1 keys=k mode=exclusive form=managed
20 w1.1.a in op=1
30 w1.1.a look op=1
30 w1.1.a out op=1
99 w1.1.a end op=1 result=ok
12 w2.1.a ask op=1 keys=k mode=exclusive form=guard session=8 opened=5
40 w2.1.a in op=1
50 w2.1.a out op=1
51 w2.1.a end op=1 result=ok
35 controller fault kind=stop from=31 until=35 worker=w1.1
";

#[test]
fn a_managed_lock_is_known_to_be_lost_before_another_has_it() {
    accepted(LEASE);
    refused(
        &LEASE.replace("30 w1.1.a out", "41 w1.1.a out"),
        "two hold k at once",
    );
    // A process that was killed while it was stopped: it had the lock when it last looked.
    let killed = "60 controller fault kind=kill from=60 until=60 worker=w1.1\n";
    let cut_off = LEASE.replace("30 w1.1.a out op=1\n99 w1.1.a end op=1 result=ok\n", "");
    accepted(&format!("{cut_off}{killed}"));
    refused(
        &format!(
            "{}{killed}",
            cut_off.replace("30 w1.1.a look", "41 w1.1.a look")
        ),
        "two hold k at once",
    );
}

#[test]
fn a_manager_that_never_tells_of_a_loss() {
    let ended = "33 controller fault kind=cut from=32 until=33 worker=w1.1\n";
    let late = LEASE
        .replace("30 w1.1.a", "60000000000 w1.1.a")
        .replace("99 w1.1.a", "60000000001 w1.1.a");
    refused(&format!("{late}{ended}"), "still had it");
}

#[test]
fn tokens_out_of_order() {
    let text = turns(&[
        ("value=200", "value=99"),
        ("token=200 changed=1", "token=99 changed=0"),
    ]);
    let wrong = check_text(&text).expect("a history");
    assert!(
        wrong
            .iter()
            .any(|wrong| wrong.contains("is not above 100 of the earlier holder")),
        "{wrong:#?}"
    );
    assert!(
        wrong
            .iter()
            .any(|wrong| wrong.contains("refused token 99 of its holder")),
        "{wrong:#?}"
    );
    let other_lock = turns(&[
        ("12 w2.1.a ask op=1 keys=k", "32 w2.1.a ask op=1 keys=j"),
        ("value=200", "value=99"),
        ("token=200", "token=99"),
        ("43 w2.1.a wrote op=1 key=k", "43 w2.1.a wrote op=1 key=j"),
    ]);
    refused(
        &other_lock,
        "token 99 of w2.1.a/1 is not above 100, drawn before",
    );
    let both_were_lost = "\
10 w1.1.a ask op=1 keys=k mode=exclusive form=managed
21 w1.1.a token op=1 value=100
30 w1.1.a end op=1 result=ok
32 w2.1.a ask op=1 keys=j mode=exclusive form=managed
41 w2.1.a token op=1 value=99
50 w2.1.a end op=1 result=ok
";
    refused(
        both_were_lost,
        "token 99 of w2.1.a/1 is not above 100, drawn before",
    );
}

#[test]
fn a_resource_that_takes_an_old_token() {
    let text = turns(&[(
        "30 w1.1.a out",
        "46 w1.1.a wrote op=1 key=k from=45 token=100 changed=1\n30 w1.1.a out",
    )]);
    refused(&text, "k accepted token 100 after 200");
    accepted(&text.replace("from=45 token=100 changed=1", "from=45 token=100 changed=0"));
}

#[test]
fn a_lost_and_a_doubled_increment() {
    refused(
        &turns(&[("counter key=k value=2", "counter key=k value=1")]),
        "the counter k is 1",
    );
    refused(
        &turns(&[("counter key=k value=2", "counter key=k value=3")]),
        "the counter k is 3",
    );
    let text = turns(&[
        ("key=k value=2\n45", "key=k value=1\n45"),
        ("added op=1 key=k value=2", "added op=1 key=k value=1"),
    ]);
    refused(&text, "two set the counter k to 1");
    let unsure = turns(&[("45 w2.1.a added op=1 key=k value=2\n", "")]);
    accepted(&unsure);
    accepted(&unsure.replace("counter key=k value=2", "counter key=k value=1"));
}

#[test]
fn more_inside_than_permits() {
    let semaphore = "\
10 w1.1.a ask op=1 keys=s mode=2 form=guard session=7 opened=5
20 w1.1.a in op=1 slot=0
30 w1.1.a out op=1
31 w1.1.a end op=1 result=ok
12 w2.1.a ask op=1 keys=s mode=2 form=guard session=8 opened=5
22 w2.1.a in op=1 slot=1
32 w2.1.a out op=1
33 w2.1.a end op=1 result=ok
";
    accepted(semaphore);
    refused(
        &semaphore.replace("slot=1", "slot=0"),
        "two hold s#0 at once",
    );
    refused(
        &semaphore.replace("slot=1", "slot=2"),
        "is inside with slot Some(2)",
    );
    refused(
        &semaphore.replace(" slot=1", ""),
        "is inside with slot None",
    );
}

#[test]
fn errors_without_a_cause() {
    for result in [
        "NotHeld",
        "Lost",
        "Database",
        "Interrupted",
        "Deadlock",
        "TooManyLocks",
        "Timeout",
        "busy",
    ] {
        refused(
            &turns(&[(
                "51 w2.1.a end op=1 result=ok",
                &format!("51 w2.1.a end op=1 result={result}"),
            )]),
            result,
        );
    }
    let ended = "48 controller fault kind=end from=47 until=48 session=8\n";
    accepted(&format!(
        "{}{ended}",
        turns(&[(
            "51 w2.1.a end op=1 result=ok",
            "51 w2.1.a end op=1 result=Lost"
        )])
    ));
    let not_held = turns(&[(
        "51 w2.1.a end op=1 result=ok",
        "51 w2.1.a end op=1 result=NotHeld",
    )]);
    refused(&format!("{not_held}{ended}"), "NotHeld");
    let other = "48 controller fault kind=end from=47 until=48 session=7\n";
    let lost = turns(&[(
        "51 w2.1.a end op=1 result=ok",
        "51 w2.1.a end op=1 result=Lost",
    )]);
    refused(&format!("{lost}{other}"), "Lost");
    accepted(&turns(&[
        ("form=guard session=8", "form=guard+limit session=8"),
        (
            "51 w2.1.a end op=1 result=ok",
            "51 w2.1.a end op=1 result=Timeout",
        ),
    ]));
}

#[test]
fn what_nobody_may_leave_behind() {
    refused(
        &turns(&[("free key=k after=3", "kept key=k")]),
        "was not freed",
    );
    refused(&turns(&[("sum value=400", "sum value=399")]), "the sum");
    refused(
        &format!("{TURNS}70 w1.1.a dirty session=7\n"),
        "a connection of the pool held a lock",
    );
    refused(
        &turns(&[("51 w2.1.a end op=1 result=ok\n", "")]),
        "never ended",
    );
    refused(
        &format!("{TURNS}70 controller wrong text=a process hangs\n"),
        "a process hangs",
    );
}

#[test]
fn the_locks_of_a_transaction_end_at_the_error_that_aborts_it() {
    let overlap = turns(&[("40 w2.1.a in", "29 w2.1.a in")]);
    let full = "33 controller fault kind=full from=8 until=33 of=locks\n";
    let failed = overlap.replace(
        "31 w1.1.a end op=1 result=ok",
        "31 w1.1.a end op=1 result=Database",
    );
    refused(&format!("{failed}{full}"), "two hold k at once");
    let of_transaction =
        |text: &str| text.replacen("form=guard session=7", "form=Transaction session=7", 1);
    accepted(&of_transaction(&format!("{failed}{full}")));
    refused(
        &of_transaction(&format!("{overlap}{full}")),
        "two hold k at once",
    );
    let dropped = of_transaction(&overlap.replace(
        "31 w1.1.a end op=1 result=ok",
        "31 w1.1.a end op=1 result=dropped",
    ));
    refused(&dropped, "two hold k at once");
    accepted(&format!(
        "{dropped}28 controller fault kind=cancel from=27 until=28 session=7\n"
    ));
}

#[test]
fn a_connection_of_the_pool_that_fails_without_a_cause() {
    let text = format!("{TURNS}70 w1.1.a unfit session=7 opened=5 text=out of step\n");
    refused(&text, "handed on session 7");
    accepted(&format!(
        "{text}28 controller fault kind=cut from=60 until=61 worker=w1.1\n"
    ));
    refused(
        &format!("{text}28 controller fault kind=stop from=60 until=61 worker=w1.1\n"),
        "handed on session 7",
    );
}
