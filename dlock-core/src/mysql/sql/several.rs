//! Statements about several locks. The names are one bind, an array in JSON, so that there is one text for any number
//! of them. MySQL 8.0 and MariaDB 10.6 have JSON_TABLE, which needs no privilege.

use super::super::tag::Tag;
use super::{Cluster, Text};
use crate::proto::{Bind, Columns, Condition, Hold, OpenTransaction, Prepared, Statement};

/// Several names as one value.
#[derive(Debug)]
pub(in crate::mysql) struct List(String);

impl List {
    pub(in crate::mysql) fn new<'n>(names: impl Iterator<Item = &'n String>) -> Self {
        let mut json = String::from("[");
        for name in names {
            if json.len() > 1 {
                json.push(',');
            }
            json.push('"');
            for letter in name.chars() {
                match letter {
                    '"' | '\\' => json.extend(['\\', letter]),
                    control if control < ' ' => json += &format!("\\u{:04x}", u32::from(control)),
                    letter => json.push(letter),
                }
            }
            json.push('"');
        }
        json.push(']');
        Self(json)
    }

    pub(in crate::mysql) fn of<'h>(holds: impl Iterator<Item = &'h Hold<String>>) -> Self {
        Self::new(holds.map(|hold| &hold.key))
    }

    fn bind(&self) -> Bind {
        Bind::Binary(self.0.as_bytes().to_vec())
    }

    /// The rows of the names in their order, as [`names!`].
    fn rows(&self) -> String {
        let hex: String = self.0.bytes().map(|byte| format!("{byte:02x}")).collect();
        format!("JSON_TABLE(CONVERT(x'{hex}' USING utf8mb4){}", columns!())
    }
}

macro_rules! columns {
    () => {
        ", '$[*]' COLUMNS (n FOR ORDINALITY, name VARCHAR(192) CHARACTER SET utf8mb4 PATH '$')) k"
    };
}
use columns;

/// What follows the bind of the names.
macro_rules! names {
    ($($text:expr),*) => {
        concat!(" USING utf8mb4)", columns!(), $($text),*)
    };
}

/// Takes the next lock, unless one before it was taken by others. After each step the session remembers how many it has
/// got, and for which request, so that after a failure nobody has to guess.
///
/// What is assigned is compared with a number that it never is. MariaDB (10.11) does not evaluate `(@a := 0) IS NULL`.
macro_rules! take_next {
    ($taken:literal, $check:ident) => {
        concat!(
            $taken,
            "(NOT (GET_LOCK(",
            name_unless_cluster!($check),
            ", 0) <=> 1) OR (@dlock_got := k.n) = 0)"
        )
    };
}

/// On one of several servers that take writes it is a name that no server takes: see `unless_cluster!`.
macro_rules! name_unless_cluster {
    (checked) => {
        concat!(
            "IF(",
            may_be_one_of_several!(),
            ", REPEAT('-', 999), k.name)"
        )
    };
    (unchecked) => {
        "k.name"
    };
}

macro_rules! take_droppable {
    ($check:ident) => {
        &[
            explained!("SELECT 4611686018427387904 + CAST("),
            " AS SIGNED) + IFNULL((SELECT MIN(k.n) FROM JSON_TABLE(CONVERT(",
            names!(" WHERE IF("),
            ", NOT (RELEASE_LOCK(k.name) <=> 1), IF(k.n = 1, (@dlock_request := CAST(",
            concat!(
                " AS SIGNED)) = 0 OR (@dlock_got := 0) = 1, FALSE) OR ",
                take_next!("@dlock_got = k.n - 1 AND ", $check),
                ")), 0) AS answer"
            ),
        ]
    };
}

macro_rules! take {
    ($check:ident) => {
        &[
            explained!("SELECT k.n FROM JSON_TABLE(CONVERT("),
            names!(" WHERE IF(k.n = 1, (@dlock_request := CAST("),
            concat!(
                " AS SIGNED)) = 0 OR (@dlock_got := 0) = 1, FALSE) OR ",
                take_next!("", $check),
                " LIMIT 1 INTO @dlock_answer"
            ),
        ]
    };
}

fn take_droppable(tag: Tag, list: &List, release: bool, cluster: Cluster) -> Statement {
    const TAKE: [Text; 2] = [take_droppable!(checked), take_droppable!(unchecked)];
    let binds = [
        tag.bind(),
        list.bind(),
        Bind::Integer(release.into()),
        tag.bind(),
    ];
    Statement::number(Prepared::ByText, TAKE[cluster.index()], binds)
}

/// Takes locks in their order, up to the first that is taken by others, and does not wait. Those before it are held
/// then. [`read_place`] reads the answer.
pub(in crate::mysql) fn take_all(
    tag: Tag,
    list: &List,
    droppable: bool,
    cluster: Cluster,
) -> Statement {
    const TAKE: [Text; 2] = [take!(checked), take!(unchecked)];
    if droppable {
        return take_droppable(tag, list, false, cluster);
    }
    let sql = TAKE[cluster.index()];
    Statement::number(Prepared::ByText, sql, [list.bind(), tag.bind()]).columns(Columns::Affected)
}

/// Releases all of them.
pub(in crate::mysql) fn release_all(tag: Tag, list: &List, droppable: bool) -> Statement {
    const RELEASE: Text = &[
        explained!("SELECT 1 FROM (SELECT MIN(k.n) AS n FROM JSON_TABLE(CONVERT("),
        names!(
            " WHERE NOT (RELEASE_LOCK(k.name) <=> 1)) r WHERE (@dlock_lost := r.n) IS NOT NULL LIMIT 1 \
             INTO @dlock_answer"
        ),
    ];
    if droppable {
        return take_droppable(tag, list, true, Cluster::Checked);
    }
    Statement::number(Prepared::ByText, RELEASE, [list.bind()]).columns(Columns::Affected)
}

/// How many locks [`take_all`] has got without rows.
pub(in crate::mysql) fn got(tag: Tag) -> Statement {
    const GOT: Text = &[
        explained!("SELECT 4611686018427387904 + CAST("),
        " AS SIGNED) + CAST(@dlock_got AS SIGNED) AS answer",
    ];
    Statement::number(Prepared::Never, GOT, [tag.bind()])
}

/// The place of the first lock that [`release_all`] has not released, without rows.
pub(in crate::mysql) fn lost(tag: Tag) -> Statement {
    const LOST: Text = &[
        explained!("SELECT 4611686018427387904 + CAST("),
        " AS SIGNED) + CAST(@dlock_lost AS SIGNED) AS answer",
    ];
    Statement::number(Prepared::Never, LOST, [tag.bind()])
}

/// The number of the error, and how many locks the request has got. See [`examine`](super::examine).
pub(in crate::mysql) fn examine_all(tag: Tag, request: Tag) -> Statement {
    const EXAMINE: Text = &[
        explained!("SELECT CAST(@dlock_errno AS SIGNED) AS errno, 4611686018427387904 + CAST("),
        " AS SIGNED) + IF(@dlock_request <=> CAST(",
        " AS SIGNED), CAST(@dlock_got AS SIGNED), 0) AS answer",
    ];
    Statement::number(Prepared::ByText, EXAMINE, [tag.bind(), request.bind()])
        .columns(Columns::Pair)
}

/// Whether this session holds all of them: 1 or 0.
pub(in crate::mysql) fn all_held(tag: Tag, list: &List, droppable: bool) -> Statement {
    const DROPPABLE: Text = &[
        explained!("SELECT 4611686018427387904 + CAST("),
        " AS SIGNED) + ((SELECT COUNT(*) FROM JSON_TABLE(CONVERT(",
        names!(" WHERE NOT (IS_USED_LOCK(k.name) <=> CONNECTION_ID())) = 0) AS answer"),
    ];
    const TEXT: Text = &[
        explained!("SELECT 1 FROM (SELECT COUNT(*) AS n FROM JSON_TABLE(CONVERT("),
        names!(
            " WHERE NOT (IS_USED_LOCK(k.name) <=> CONNECTION_ID())) r WHERE r.n = 0 LIMIT 1 INTO @dlock_answer"
        ),
    ];
    if droppable {
        return Statement::number(Prepared::ByText, DROPPABLE, [tag.bind(), list.bind()]);
    }
    Statement::number(Prepared::ByText, TEXT, [list.bind()]).columns(Columns::Affected)
}

macro_rules! all_held {
    ($before:literal, $after:literal) => {
        [
            concat!($before, "((SELECT COUNT(*) FROM JSON_TABLE(CONVERT("),
            names!(
                " WHERE NOT (IS_USED_LOCK(k.name) <=> CONNECTION_ID())) = 0)",
                $after
            ),
        ]
    };
}

/// [`draw_token`](super::draw_token) for the session that holds all of them.
pub(in crate::mysql) fn draw_token_of_all(tag: Tag, list: &List) -> Statement {
    const HELD: [&str; 2] = all_held!(
        " AS SIGNED) AS answer, IF(",
        ", CAST(UUID_SHORT() & 72057594037927935 AS SIGNED), NULL) AS token"
    );
    const TEXT: Text = &[
        "/* dlock: draws a fencing token */ SELECT 4611686018427387904 + CAST(",
        HELD[0],
        HELD[1],
    ];
    Statement::number(Prepared::ByText, TEXT, [tag.bind(), list.bind()]).columns(Columns::Pair)
}

/// A condition for the user's own statements: whether this session holds all of them.
pub(in crate::mysql) fn held_all(list: &List) -> Condition {
    const TEXT: [&str; 2] = all_held!("", "");
    Condition::new(&TEXT, [list.bind()])
}

/// [`release_unread`](super::release_unread) for several locks. It is sent only once: a cancel can come after some of
/// them, and a second copy would not know that.
pub(in crate::mysql) fn release_all_unread(list: &List, transaction: OpenTransaction) -> String {
    let release = format!(
        "DO (SELECT COUNT(*) FROM {} WHERE RELEASE_LOCK(k.name))",
        list.rows()
    );
    match transaction {
        OpenTransaction::RollBack => format!("ROLLBACK; {release}"),
        OpenTransaction::None | OpenTransaction::Keep => release,
    }
}

/// Releases, where nobody reads the answer, what [`take_all`] may have got. It is sent only once, as
/// [`release_all_unread`] is.
pub(in crate::mysql) fn reclaim_all_unread(request: Tag, list: &List) -> String {
    let request = request.number();
    format!(
        "SET @dlock_request = IF(@dlock_request <=> {request}, 0 * (SELECT COUNT(*) FROM {} \
         WHERE k.n <= @dlock_got AND RELEASE_LOCK(k.name)), @dlock_request)",
        list.rows()
    )
}
