use std::ops::Deref;

use dlock_tests::{Kind, Server, TestConnection, unique_key};

/// A user (on PostgreSQL a role) for one test, dropped at its end.
pub(crate) struct TestUser<O: TestConnection> {
    admin: O,
    name: String,
    url: String,
}

impl<O: TestConnection> TestUser<O> {
    /// A user without any privileges but to connect, and with `options` as `CREATE USER` takes them. `admin` is a
    /// connection to this server.
    pub(crate) fn create(mut admin: O, server: &Server, options: &str) -> Self {
        let mut name = unique_key("u").replace(['/', '-'], "_");
        // MySQL's names have at most 32 characters.
        name.truncate(32);
        let (start, database) = server.url.rsplit_once('/').expect("a URL with a database");
        let (scheme, rest) = start.split_once("://").expect("a URL with a scheme");
        let address = rest.rsplit_once('@').map_or(rest, |(_, address)| address);
        let url = format!("{scheme}://{name}:secret@{address}/{database}");
        match server.kind {
            Kind::Postgres => {
                admin.execute_sql(&format!("CREATE USER {name} PASSWORD 'secret' {options}"));
            }
            Kind::Mysql => {
                let identified = "IDENTIFIED BY 'secret'";
                admin.execute_sql(&format!("CREATE USER {name} {identified} {options}"));
                // Any privilege, to connect to the database.
                admin.execute_sql(&format!("GRANT CREATE ROUTINE ON {database}.* TO {name}"));
            }
            Kind::Sqlite => panic!("SQLite has no users"),
        }
        Self { admin, name, url }
    }

    /// Where this user connects.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }
}

impl<O: TestConnection> Deref for TestUser<O> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.name
    }
}

impl<O: TestConnection> Drop for TestUser<O> {
    fn drop(&mut self) {
        let drop_user = format!("DROP USER {}", self.name);
        let _ = self.admin.batch_execute(&drop_user);
    }
}
