//! What the workers work on: locks, and tables that only these locks protect.

/// Locks of one key. Where something is broken, all want the first three.
pub(crate) const KEYS: [&str; 12] = [
    "k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "k8", "k9", "k10", "k11",
];
/// Locks that are taken two at once, and the accounts that they protect: the first four where something is broken.
pub(crate) const ACCOUNTS: [&str; 8] = ["a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7"];
/// What is in all accounts together.
pub(crate) const SUM: i64 = 4000;
/// A semaphore, and its permits.
pub(crate) const SEMAPHORE: (&str, u32) = ("s0", 2);

/// The statements that make the tables.
pub(crate) fn schema() -> Vec<String> {
    let mut statements = Vec::new();
    for table in ["counter", "account", "resource"] {
        statements.push(format!(
            "CREATE TABLE {table} (id VARCHAR(20) NOT NULL PRIMARY KEY, n BIGINT NOT NULL)"
        ));
    }
    for key in KEYS {
        statements.push(format!("INSERT INTO counter (id, n) VALUES ('{key}', 0)"));
        statements.push(format!("INSERT INTO resource (id, n) VALUES ('{key}', 0)"));
    }
    for account in ACCOUNTS {
        statements.push(format!(
            "INSERT INTO account (id, n) VALUES ('{account}', {})",
            SUM / ACCOUNTS.len() as i64
        ));
    }
    statements
}

/// The lock of a name in this run: on MySQL all databases of a server share them.
pub(crate) fn lock_key(run: &str, name: &str) -> String {
    format!("proof/{run}/{name}")
}
