//! How a statement of the core is sent on a connection of PostgreSQL or MySQL. A macro, because it is the same with and
//! without `.await`.

/// The rows of a statement of PostgreSQL (`Pg`) or MySQL (`Mysql`). Each named statement has a type of its own, by
/// which Diesel finds it prepared. Each type has to be compiled for each connection type, so only the names of that
/// server are looked for, and only where such a statement answers in that way.
///
/// All rows are read, although there is one at most: a statement that is killed late answers with its row and then with
/// an error. diesel-async's `get_result` leaves that error to the next statement on MySQL, which may be the user's.
#[doc(hidden)]
#[macro_export]
macro_rules! __load {
    ($server:ident, $conn:ident, $statement:ident, $($await:tt)*) => {{
        use $crate::__load_named as load_named;
        use $crate::shared::for_each_prepared;

        for_each_prepared!(load_named $server $conn, $statement, [$($await)*])
    }};
}

#[doc(hidden)]
#[macro_export]
macro_rules! __load_named {
    (
        [$($read:ident)*] [$($both:ident)*] [$($unread:ident)*] $_number:tt $_pair:tt $_affected:tt
        Pg $($arguments:tt)*
    ) => {
        $crate::__load_by_name!([$($read)* $($both)*] [] [$($both)* $($unread)*] $($arguments)*)
    };
    ($_read:tt $_both:tt $_unread:tt $number:tt $pair:tt $affected:tt Mysql $($arguments:tt)*) => {
        $crate::__load_by_name!($number $pair $affected $($arguments)*)
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __load_by_name {
    ([$($number:ident)*] [$($pair:ident)*] [$($affected:ident)*] $conn:ident, $statement:ident, $await:tt) => {{
        use $crate::shared::proto::{Columns, Prepared, Rows};
        use $crate::shared::{ByText, CoreQuery, HolderColumns, HolderRow, Number, Pair, to_holder};

        let columns = $statement.columns;
        match columns {
            Columns::Number | Columns::NoRow => {
                let rows = match $statement.prepared {
                    $(Prepared::$number => $crate::__await!($await
                        CoreQuery::<Number, { Prepared::$number as u8 }>::new($statement).load($conn)),)*
                    _ => $crate::__await!($await ByText::<Number>::new($statement).load($conn)),
                };
                let rows: Vec<Option<i64>> = rows?;
                Ok(Rows::Number(match (rows.into_iter().next(), columns) {
                    (Some(number), _) => number,
                    (None, Columns::NoRow) => Some(1),
                    (None, _) => return Err(diesel::NotFound),
                }))
            }
            Columns::Affected | Columns::AnyRow => {
                let affected = match $statement.prepared {
                    $(Prepared::$affected => $crate::__await!($await
                        CoreQuery::<Number, { Prepared::$affected as u8 }>::new($statement).execute($conn)),)*
                    _ => $crate::__await!($await ByText::<Number>::new($statement).execute($conn)),
                };
                let affected = affected?.try_into().ok();
                Ok(Rows::Number(match columns {
                    Columns::AnyRow => affected.map(|rows: i64| i64::from(rows == 0)),
                    _ => affected,
                }))
            }
            Columns::Pair => {
                let rows = match $statement.prepared {
                    $(Prepared::$pair => $crate::__await!($await
                        CoreQuery::<Pair, { Prepared::$pair as u8 }>::new($statement).load($conn)),)*
                    _ => $crate::__await!($await ByText::<Pair>::new($statement).load($conn)),
                };
                let rows: Vec<(Option<i64>, Option<i64>)> = rows?;
                let (first, second) = rows.into_iter().next().ok_or(diesel::NotFound)?;
                Ok(Rows::Pair(first, second))
            }
            Columns::Holders => {
                let query = ByText::<HolderColumns>::new($statement);
                let rows = $crate::__await!($await query.load::<HolderRow>($conn))?;
                Ok(Rows::Holders(rows.into_iter().map(to_holder).collect()))
            }
            Columns::Text => {
                let query = ByText::<diesel::sql_types::Text>::new($statement);
                Ok(Rows::Text($crate::__await!($await query.get_result($conn))?))
            }
        }
    }};
}

/// Awaits it, or not.
#[doc(hidden)]
#[macro_export]
macro_rules! __await {
    ([$($await:tt)*] $query:expr) => {
        $query $($await)*
    };
}
