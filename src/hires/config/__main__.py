from hires.config.keys import main

main()
