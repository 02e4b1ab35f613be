# Its data is deleted next.
STOP=KILL

setup() {
  cat >"$FOLDER/init.sql" <<'SQL'
CREATE USER IF NOT EXISTS 'test'@'%' IDENTIFIED BY 'test';
GRANT ALL PRIVILEGES ON *.* TO 'test'@'%' WITH GRANT OPTION;
CREATE DATABASE IF NOT EXISTS test;
SQL
  if [ -n "$INSTALL" ]; then
    # An anonymous user of the own host would win over 'test'@'%'.
    echo "DELETE FROM mysql.global_priv WHERE User = ''; FLUSH PRIVILEGES;" >>"$FOLDER/init.sql"
    "$INSTALL" --no-defaults --datadir="$FOLDER/data" --tmpdir="$FOLDER" --skip-test-db \
      --auth-root-authentication-method=normal
  else
    "$SERVER" --no-defaults --initialize-insecure --datadir="$FOLDER/data" --tmpdir="$FOLDER"
  fi
}

# Options that only one of the two products knows are `loose`.
serve() {
  exec "$SERVER" --no-defaults --datadir="$FOLDER/data" --tmpdir="$FOLDER" --init-file="$FOLDER/init.sql" \
    --bind-address=127.0.0.1 --port="$PORT" --socket="$FOLDER/socket" --pid-file="$FOLDER/pid" \
    --max-connections=500 --performance-schema=ON --skip-name-resolve --innodb-flush-log-at-trx-commit=0 \
    --loose-disable-log-bin --loose-mysqlx=OFF --loose-secure-file-priv= $OPTIONS
}
