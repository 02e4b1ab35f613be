//! The texts of the statements that are sent most.

/// Explains the statement to anyone reading the process list. It is long and comes first, so that the text need not
/// grow much when Diesel puts it together. (A colon with a name behind it would be a bind to mysql_async.)
macro_rules! explained {
    ($($text:expr),*) => {
        concat!(
            "/* dlock: acquires or releases a named lock; a large number marks the request, so that no answer \
             is taken for another's */ ",
            $($text),*
        )
    };
}

/// The beginning of a statement that may wait. No setting of the user cuts the wait short: on MariaDB none does, and
/// MySQL's `max_execution_time` is overridden by a limit in the text (no limit would not do: MySQL 9.7).
macro_rules! select {
    ($limit:literal, $columns:literal) => {
        explained!(
            "/*M! SET STATEMENT max_statement_time = 0 FOR */ SELECT /*+ MAX_EXECUTION_TIME(",
            $limit,
            ") */ ",
            $columns,
            "(@dlock_request := CAST("
        )
    };
}

/// The end of a call of GET_LOCK, from the milliseconds on. MySQL takes whole seconds, MariaDB fractions (how many
/// digits a division has is a setting, `div_precision_increment`).
macro_rules! seconds {
    ($mysql:literal) => {
        concat!(" /*M! * 0.001 */ /*!80000 ", $mysql, " */), 2)")
    };
}

/// Whether this may be one of several servers that take writes, each of which has locks of its own, unless the user
/// says that all programs connect to the same one.
///
/// - MariaDB: a node of a Galera cluster.
/// - MySQL: those who let several servers write keep the numbers of AUTO_INCREMENT apart, by one of two variables whose
///   least value is 1. Group replication and Percona XtraDB Cluster do so by themselves.
///   `@@group_replication_single_primary_mode` itself would be an error on servers without the plugin, and a table that
///   has it costs more than the lock. Others also set these variables, so
///   [`several_writers`](super::several_writers) is asked next, once in a session.
///
/// MySQL 9.7 needs 1.1 microseconds for it, of about 31 for a lock and its release where client and server share one
/// processor; MariaDB 11.8 needs 1.9 of 28. The table would take 1.7 milliseconds, also where the session remembers the
/// answer.
macro_rules! may_be_one_of_several {
    () => {
        "/*M! @@wsrep_on AND */ /*!80000 @@global.auto_increment_increment + @@global.auto_increment_offset <> 2 \
         AND */ @dlock_one_node IS NULL"
    };
}

/// The beginning of the lock's name. On one of several servers that take writes it is a name that no server takes:
/// error 1059 of MariaDB, 3057 or 4163 of MySQL.
macro_rules! unless_cluster {
    ($text:literal, checked) => {
        concat!(
            $text,
            "IF(",
            may_be_one_of_several!(),
            ", REPEAT('-', 999), CONVERT("
        )
    };
    ($text:literal, unchecked) => {
        concat!($text, "CONVERT(")
    };
}

/// The end of the lock's name.
macro_rules! name_ends {
    (checked) => {
        " USING utf8mb4)), "
    };
    (unchecked) => {
        " USING utf8mb4), "
    };
}

/// The text of [`acquire`] for libmariadb. The binds: the tag, the name, the milliseconds.
///
/// It has no rows. MySQL begins to answer with rows and then reports that the wait was killed, and libmariadb (3.3)
/// hangs when it executes a kept statement again that has failed like that.
macro_rules! acquire {
    ($limit:literal, $mysql:literal, $check:ident) => {
        &[
            select!($limit, "1 FROM DUAL WHERE IF("),
            unless_cluster!(
                " AS SIGNED)) IS NULL, 2, @dlock_answer := IFNULL(GET_LOCK(",
                $check
            ),
            name_ends!($check),
            concat!(seconds!($mysql), ") = 1 LIMIT 1 INTO @dlock_answer"),
        ]
    };
}

/// The text of [`acquire`] and [`release`] for mysql_async. The binds: the tag, 1 to release, the name, the name again,
/// the milliseconds.
///
/// The answer has a tag, because callers may drop it. One text does both, so that the driver has prepared it when a
/// release is to be sent. Then the release is one message, and the server obeys it even if the future that sent it is
/// dropped.
macro_rules! droppable {
    ($limit:literal, $mysql:literal, $check:ident) => {
        &[
            select!($limit, "4611686018427387904 + "),
            " AS SIGNED)) + IF(",
            ", IFNULL(RELEASE_LOCK(CONVERT(",
            unless_cluster!(" USING utf8mb4)), 0), IFNULL(GET_LOCK(", $check),
            name_ends!($check),
            concat!(seconds!($mysql), ") AS answer"),
        ]
    };
}

/// Texts for waits under a second, by the binary logarithm of the milliseconds after which MySQL ends them. Its
/// GET_LOCK takes whole seconds only. The statement's own limit is exact, but stands in the text.
macro_rules! under_a_second {
    ($text:ident, $check:ident) => {
        [
            $text!("1", "DIV 1000 + 1", $check),
            $text!("2", "DIV 1000 + 1", $check),
            $text!("4", "DIV 1000 + 1", $check),
            $text!("8", "DIV 1000 + 1", $check),
            $text!("16", "DIV 1000 + 1", $check),
            $text!("32", "DIV 1000 + 1", $check),
            $text!("64", "DIV 1000 + 1", $check),
            $text!("128", "DIV 1000 + 1", $check),
            $text!("256", "DIV 1000 + 1", $check),
            $text!("512", "DIV 1000 + 1", $check),
        ]
    };
}

pub(in crate::mysql) use {explained, may_be_one_of_several};
