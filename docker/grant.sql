-- Tests make users and look at other sessions.
GRANT ALL PRIVILEGES ON *.* TO 'test'@'%' WITH GRANT OPTION;
