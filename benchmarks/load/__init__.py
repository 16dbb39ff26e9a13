"""`dsgnn-bench load`: artifacts and servers under the load of MLPerf's LoadGen."""
